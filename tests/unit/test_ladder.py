"""What carries data between GPUs: chosen by reasons, by trying, and alike on every rank."""

import logging
import threading

import pytest

from epcomm.bootstrap import Bootstrap
from epcomm.check import check_fabric
from epcomm.cpu.segments import Segment
from epcomm.errors import FabricError
from epcomm.fabric import ladder
from epcomm.fabric.abi import transports
from epcomm.fabric.fabric import RegionMemory
from epcomm.topology import Topology

NBYTES = 1 << 16


@pytest.fixture
def region():
    segment = Segment.create("epcomm-ladder", NBYTES)
    return RegionMemory(segment.address, NBYTES, segment, segment.fd)


class World:
    """Ranks as threads, each with what it runs and what it got."""

    def __init__(self, size: int) -> None:
        self.items: list = [None] * size
        self.barrier = threading.Barrier(size)
        self.size = size

    def run(self, body):
        """``body(bootstrap)`` on every rank; results, or the exceptions raised, by rank."""
        results: list = [None] * self.size

        def one(rank: int) -> None:
            try:
                results[rank] = body(Member(self, rank))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(r,), daemon=True) for r in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results


class Member(Bootstrap):
    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank, self.size = world, rank, world.size

    def allgather(self, item):
        self.world.items[self.rank] = item
        self.world.barrier.wait(20)
        items = list(self.world.items)
        self.world.barrier.wait(20)
        return items


def test_first_without_a_reason_is_picked_and_the_faster_ones_are_explained():
    assert ladder.pick({"a": "", "b": ""}) == ("a", "a")
    assert ladder.pick({"a": "no card", "b": ""}) == ("b", "b (a: no card)")
    assert ladder.pick({"a": "x", "b": "y", "c": ""}) == ("c", "c (a: x; b: y)")
    assert ladder.pick({"a": "x", "b": "y"}) == ("", "none (a: x; b: y)")


def choose_among(reasons_by_rank, monkeypatch, hosts=None):
    """What ranks choose that cannot use fabrics for these reasons (ibgda, proxy/verbs)."""
    size = len(reasons_by_rank)
    local = threading.local()
    hosts = hosts or ["host"] * size
    monkeypatch.setattr(ladder, "this_host", lambda: hosts[local.rank])

    def body(bootstrap):
        local.rank = bootstrap.rank
        names = ("ibgda", "proxy/verbs")
        mine = dict(zip(names, reasons_by_rank[bootstrap.rank], strict=True))
        return ladder.choose(bootstrap, mine.__getitem__)

    return World(size).run(body)


@pytest.mark.parametrize(
    ("reasons", "chosen", "line"),
    [
        ([("", "")] * 3, "ibgda", "ibgda"),
        ([("", ""), ("no card", ""), ("", "")], "proxy/verbs", "(ibgda: rank 1: no card)"),
        # One rank lacks the first, another the second.
        (
            [("no UAR", ""), ("", "no GID"), ("", "")],
            "proxy/local",
            "proxy/local (ibgda: rank 0: no UAR; proxy/verbs: rank 1: no GID)",
        ),
        (
            [("none", "none")] * 3,
            "proxy/local",
            "proxy/local (ibgda: none; proxy/verbs: none)",
        ),
    ],
)
def test_all_ranks_choose_alike(reasons, chosen, line, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "epcomm")
    assert choose_among(reasons, monkeypatch) == [chosen] * 3
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith("epcomm: fabric ")
    assert record.getMessage().endswith(line)


def test_machines_that_could_do_better_are_warned(monkeypatch, caplog):
    hosts = ["a", "a", "b", "b"]
    reasons = [("", "")] * 3 + [("no mapping", "")]
    assert choose_among(reasons, monkeypatch, hosts) == ["proxy/verbs"] * 4
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "epcomm: fabric proxy/verbs (ibgda: rank 3: no mapping)"


def test_machines_without_a_network_get_an_error_on_every_rank(monkeypatch):
    results = choose_among([("no card", "no card")] * 2, monkeypatch, ["a", "b"])
    for error in results:
        assert isinstance(error, FabricError)
        assert "proxy/local: the ranks are on 2 machines" in str(error)
        assert "ibgda: no card" in str(error)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("transport", ["local", "emulated"])
def test_transport_that_works_has_nothing_against_it(transport, region):
    assert ladder.attempt(transport, "", region) == ""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("transport", "arguments", "reason"),
    [
        ("nothing", "", "no transport nothing"),
        ("emulated", "color=1", '"color=1" is not one of'),
        ("verbs", "nic=none_0", "none_0"),
        ("mlx5", "nic=none_0", ""),
    ],
)
def test_transport_that_does_not_work_says_why(transport, arguments, reason, region):
    why = ladder.attempt(transport, arguments, region)
    assert why
    # Without the vendors' libraries, or any device, that is the reason, with its remedy.
    assert reason in why or "install rdma-core" in why or "there is no RDMA device here" in why


@pytest.mark.timeout(60)
def test_end_that_does_not_come_back_is_a_reason(monkeypatch, region):
    monkeypatch.setattr(ladder, "_PATIENCE", 0.5)
    monkeypatch.setattr(ladder, "Fabric", lambda *_: threading.Event().wait(20))
    assert ladder.attempt("local", "", region) == "not done after 1 s"


def test_names_become_transports_with_the_rank_s_place(region):
    topology = Topology(3, (0, 0, 1, 1))

    def resolve(fabric):
        return ladder.resolve(None, topology, fabric, lambda: region)

    assert resolve("ibgda") == ("mlx5", "local_rank=1")
    assert resolve("ibgda tc=106 doorbell=cpu") == ("mlx5", "local_rank=1 tc=106 doorbell=cpu")
    assert resolve("proxy/verbs nic=a") == ("verbs", "local_rank=1 nic=a")
    assert resolve("proxy/local") == ("local-cuda", "")
    assert resolve("emulated rate=5") == ("emulated-cuda", "rate=5")
    assert resolve("proxy/emulated rate=5") == ("emulated-cuda-proxy", "rate=5")


@pytest.mark.timeout(110)
def test_auto_tries_what_is_here_and_takes_the_same_everywhere(region, caplog):
    caplog.set_level(logging.INFO, "epcomm")
    topologies = [Topology(rank, (0, 1)) for rank in range(2)]
    results = World(2).run(lambda b: ladder.resolve(b, topologies[b.rank], "auto", lambda: region))
    assert results[0] == results[1]
    assert results[0][0] in ladder.TRANSPORTS.values()
    if results[0][0] == "local-cuda":
        assert "ibgda: " in caplog.text
        assert "proxy/verbs: " in caplog.text


def test_buffers_take_the_names_of_the_ladder():
    for fabric in ("auto", "ibgda", "ibgda tc=106", "proxy/verbs", "proxy/local"):
        check_fabric(fabric, "cuda", None)
    for fabric in ("emulated", "proxy/emulated rate=5 blocks=3"):
        check_fabric(fabric, "cuda", None)
    with pytest.raises(ValueError, match="expected one of auto, mpi"):
        check_fabric("ibgda", "cpu", None)
    assert {"verbs", "mlx5"} <= set(transports)
