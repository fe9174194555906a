"""The benchmark of posting rates without a GPU: its options, checks, figures and tables."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu.nodes_options import POSTINGS, Posting, parse
from benchmarks.gpu.nodes_posting import (
    PostingTable,
    RateFigure,
    TripFigure,
    compare_posting,
    measure_rate,
    measure_trips,
    of_line,
)
from benchmarks.gpu.options import Gpus
from benchmarks.posting import PostingSweep, PostingWorld, Span, Writers, describe_wrong, span_of
from benchmarks.verify import VerificationError
from epcomm.fabric.abi import constants, dtypes, has_kernels
from epcomm.native import library

NEVER = 2**64 - 1


# The command line --------------------------------------------------------------------------


def test_posting_is_a_case_of_its_own_fabrics() -> None:
    options = parse(["--nodes", "2", "--cases", "posting"], Gpus(1, 132))
    assert options.cases == ["posting"]
    assert options.settings("posting", None) == []
    assert options.postings == list(POSTINGS)
    # Kernels and proxies over the same lines, the second of them without one, for times alone.
    names = [posting.fabric.partition(" ") for posting in POSTINGS]
    assert [name for name, _, _ in names] == ["emulated", "proxy/emulated"] * 2
    assert names[0][2] == names[1][2] != names[2][2] == names[3][2]
    assert "rate=0 latency_ns=0" in names[2][2]
    assert [posting.rates for posting in POSTINGS] == [True, True, False, False]
    assert "posting" in parse([]).cases


def test_fabrics_that_were_asked_for_replace_them() -> None:
    options = parse(["--cases", "posting", "--fabric", "proxy/local", "emulated rate=25"])
    assert options.postings == [Posting("proxy/local", True), Posting("emulated rate=25", True)]


# What is measured --------------------------------------------------------------------------


def test_bursts_fit_into_queues_and_every_place_is_written() -> None:
    sweep = PostingSweep()
    assert 2 * sweep.burst < 1024  # two requests for each put, in a send queue
    assert sweep.many * 2 > 4 * 1024
    for writers in sweep.writers:
        assert sweep.burst % writers.warps == 0
        assert sweep.burst // writers.warps >= sweep.places
    assert Writers(1, 1) in sweep.writers
    assert sweep.channels == 16
    assert sweep.region_bytes == 32 * 16 * 7168 + 4096


def test_span_is_from_the_first_begin_to_the_last_end() -> None:
    assert span_of(np.array([0, 100, 350, 900], np.uint64)) == Span(250.0, 800.0)
    assert span_of(np.array([0, 100, 350, 0], np.uint64)) == Span(250.0, 0.0)  # a floor
    with pytest.raises(RuntimeError, match="2 writers failed"):
        span_of(np.array([2, 100, 350, 900], np.uint64))
    for nothing in ([0, NEVER, 0, 0], [0, 100, 0, 0]):
        with pytest.raises(RuntimeError, match="noted no times"):
            span_of(np.array(nothing, np.uint64))


def test_what_is_wrong_is_said() -> None:
    raised = np.array([3, 0, 5])
    right = raised.astype(np.uint64)
    assert describe_wrong(0, 0, right, raised) == ""
    text = describe_wrong(7, 2, np.array([3, 1, 4], np.uint64), raised)
    assert "7 words differ" in text
    assert "2 words were written where nothing was put" in text
    assert "signal 1 is 1, and was raised 0 times" in text
    assert "signal 2 is 4, and was raised 5 times" in text
    assert "signal 0" not in text


@pytest.mark.parametrize("direct", [True, False])
def test_kernels_are_told_who_writes_what(direct: bool) -> None:
    world = PostingWorld.__new__(PostingWorld)
    sizes = {name: dtypes[name].itemsize for name in ("fabric", "ibgda")}
    world.fabric = SimpleNamespace(  # type: ignore[assignment]
        struct=b"\1" * sizes["fabric"], ibgda=b"\2" * sizes["ibgda"] if direct else None
    )
    world._sweep, world._unread = PostingSweep(), SimpleNamespace(pointer=4096)
    probe = world._probe(Writers(4, 8), 64, 256)
    assert int(probe["puts"]) == 32
    assert (int(probe["num_channels"]), int(probe["num_warps"])) == (4, 8)
    assert int(probe["kind"]) == constants["KIND_IBGDA" if direct else "KIND_PROXY"]
    assert bytes(probe["ibgda"]) == bytes([2 if direct else 0]) * sizes["ibgda"]
    regions = [probe[name].view(dtypes["place"])[0]["region"] for name in ("local", "remote")]
    assert regions == [1, 2]


@pytest.mark.skipif(not has_kernels, reason="needs a library built with CUDA")
def test_floor_has_memory_for_every_warp() -> None:
    def bytes_of(kind: str, warps: int) -> int:
        return int(library.epcomm_fabric_probe_unread_bytes(constants[kind], warps))

    assert bytes_of("KIND_IBGDA", 32) == 32 * bytes_of("KIND_IBGDA", 1)
    assert bytes_of("KIND_IBGDA", 1) > 1024 * 64  # requests
    assert bytes_of("KIND_PROXY", 1) == 1024 * 16  # triggers


def _traffic(**fields: int) -> np.ndarray:
    traffic = np.zeros((), dtypes["traffic"])
    for name, value in fields.items():
        traffic[name] = value
    return traffic


def test_share_of_the_line_counts_headers_and_signals() -> None:
    line = {"num_nics": 1, "bytes_per_ns": 50, "packet_bytes": 4096, "header_bytes": 80}
    # 7168 bytes are two packets, the signal is one: 7168 + 160 + 88 bytes, 2 million times.
    found = of_line(_traffic(messages=200, late_copies=3, **line), 2.0, 7168)
    assert found["wire_share"] == pytest.approx(7416 * 2e6 / 50e9)
    assert found["late_copies"] == pytest.approx(1.5)
    without = of_line(_traffic(messages=200, **line | {"bytes_per_ns": 0}), 2.0, 7168)
    assert without == {"wire_share": None, "late_copies": 0.0}
    assert of_line(None, 2.0, 64)["wire_share"] is None


class _World:
    """A world whose kernels take times that a test knows."""

    def __init__(self, direct: bool, wrong: str = "") -> None:
        self.direct, self.wrong = direct, wrong
        self.done: list[str] = []
        self.fabric = SimpleNamespace(count=self._count)
        self._turn = 0

    def _count(self, *, restart: bool = False) -> None:
        self.done.append("restart" if restart else "count")

    def by_writer(self, action: Any) -> Any:
        return action()

    def clear(self) -> None:
        self.done.append("clear")

    def check(self, writers: Writers, nbytes: int) -> None:
        self.done.append("check")
        if self.wrong:
            raise VerificationError(self.wrong)

    def put(self, writers: Writers, nbytes: int, puts: int) -> Span:
        self.done.append(f"put {puts}")
        self._turn += 1
        # One of each three repeats is disturbed.
        slow = 10 if self._turn in (2, 3) else 1
        return Span(slow * puts * 1000.0, slow * puts * 2000.0)

    def floor(self, writers: Writers, nbytes: int, puts: int) -> Span:
        self.done.append(f"floor {puts}")
        return Span(puts * 250.0, 0.0)

    def trips(self, nbytes: int) -> np.ndarray:
        return np.arange(100, 0, -1, dtype=np.uint64) * np.uint64(1000)

    def split(self, nbytes: int) -> tuple[float, float]:
        return 2000.0, 9000.0


SWEEP = PostingSweep(burst=8, many=64, repeats=3)


def test_rates_are_medians_of_puts_that_were_checked_before_and_after() -> None:
    world = _World(True)
    figure = measure_rate(world, "emulated x=1", Writers(2, 4), 64, SWEEP)  # type: ignore[arg-type]
    # Two queue pairs: 16 puts in 8 us, 128 in 128 us; a floor of 16 in 2 us.
    assert figure.posted == pytest.approx(2.0)
    assert figure.floor == pytest.approx(8.0)
    assert figure.completed == pytest.approx(1.0)
    assert figure.share == pytest.approx(0.25)
    assert figure.gigabytes == pytest.approx(0.064)
    assert world.done[:3] == ["clear", "put 8", "check"]
    assert world.done[3:-2] == ["restart", *["floor 8", "put 8", "put 64"] * 3]
    assert world.done[-2:] == ["count", "check"]


def test_nothing_is_timed_that_is_wrong() -> None:
    world = _World(True, "signal 0 is 7")
    with pytest.raises(VerificationError, match="signal 0"):
        measure_rate(world, "emulated", Writers(1, 1), 64, SWEEP)  # type: ignore[arg-type]
    assert world.done == ["clear", "put 8", "check"]
    with pytest.raises(VerificationError, match="signal 0"):
        measure_trips(world, "emulated", 64)  # type: ignore[arg-type]


def test_trips_are_told_with_their_parts_where_kernels_ring() -> None:
    figure = measure_trips(_World(True), "emulated", 64)  # type: ignore[arg-type]
    assert (figure.median, figure.shortest, figure.slow) == (51.0, 1.0, 96.0)
    assert (figure.call, figure.doorbell) == (2.0, 9.0)
    assert "doorbell to completion 9.0" in str(figure)
    proxies = measure_trips(_World(False), "proxy/emulated", 64)  # type: ignore[arg-type]
    assert (proxies.median, proxies.call, proxies.doorbell) == (51.0, None, None)
    assert "doorbell" not in str(proxies)


class _Comm:
    """Rank 1's view of a broadcast, or rank 0's."""

    def __init__(self, rank: int, said: Any = None) -> None:
        self.rank, self._said = rank, said

    def bcast(self, item: Any) -> Any:
        return item if self.rank == 0 else self._said


def test_failure_of_the_writer_is_everybodys() -> None:
    world = PostingWorld.__new__(PostingWorld)
    world._comm = _Comm(0)
    assert world.by_writer(lambda: 7) == 7
    with pytest.raises(RuntimeError, match="ZeroDivisionError: "):
        world.by_writer(lambda: 1 / 0)
    world._comm = _Comm(1, (None, "FabricError: broken"))
    with pytest.raises(RuntimeError, match="FabricError: broken"):
        world.by_writer(lambda: pytest.fail("only rank 0 acts"))


# What is said ------------------------------------------------------------------------------


def _rate(direct: bool, posted: float, completed: float, **more: Any) -> RateFigure:
    fields = {"nbytes": 64, "queue_pairs": 4, "warps": 8, "floor": 10.0, "wire_share": 0.125}
    fields |= {"late_copies": 0.5} | more
    fabric = f"{'' if direct else 'proxy/'}emulated rate=50"
    return RateFigure(fabric, direct, posted=posted, completed=completed, **fields)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_kernels_stand_beside_proxies_also_where_they_lose() -> None:
    table = PostingTable()
    table.rates = [_rate(True, 2.0, 1.0), _rate(True, 5.0, 1.5, nbytes=7168, late_copies=7.0)]
    table.rates += [_rate(False, 4.0, 0.5)]
    text = compare_posting(table)
    rows = [_cells(line) for line in text if line.startswith("| ")]
    assert len({len(row) for row in rows}) == 1
    assert rows[1] == [
        "emulated (modelled network) rate=50", "64", "4", "8",
        "2.000 (20% of 10.00)", "1.000 (0.06 GB/s, 12.5% of the line)",
        "4.000 (40% of 10.00)", "0.500 (0.03 GB/s, 12.5% of the line)",
        "0.50", "2.00",
    ]  # fmt: skip
    assert rows[2][5].endswith("(10.75 GB/s, 12.5% of the line, late 7 %)")
    assert rows[2][6:] == ["", "", "", ""]
    assert compare_posting(PostingTable()) == []


def test_trips_stand_side_by_side() -> None:
    table = PostingTable()
    table.trips = [
        TripFigure("emulated rate=50", True, 64, 22.0, 20.0, 30.0, 4.0, 15.5),
        TripFigure("proxy/emulated rate=50", False, 64, 44.0, 40.0, 60.0, None, None),
        TripFigure("proxy/local", False, 64, 11.0, 10.0, 12.0, None, None),
    ]
    rows = [_cells(line) for line in compare_posting(table) if line.startswith("| ")]
    network = "emulated (modelled network) rate=50"
    assert rows[1] == [
        network,
        "64",
        "22.0 (30.0)",
        "20.0, 4.0, 15.5",
        "44.0 (60.0)",
        "40.0",
        "2.00",
    ]
    assert rows[2] == ["local", "64", "", "", "11.0 (12.0)", "10.0", ""]


def test_every_number_is_kept_with_its_floor_and_says_whether_it_is_modelled() -> None:
    table = PostingTable([_rate(True, 2.0, 1.0)])
    table.trips = [TripFigure("proxy/local", False, 64, 1.0, 1.0, 1.0, None, None)]
    record = json.loads(json.dumps(table.as_dict()))
    rate, trip = record["rates"][0], record["trips"][0]
    assert (rate["posted"], rate["floor"], rate["share"]) == (2.0, 10.0, 0.2)
    assert rate["modelled_network"]
    assert not trip["modelled_network"]
    assert "12.5% of the line" in str(_rate(True, 2.0, 1.0))
    assert "copied late" not in str(_rate(True, 2.0, 1.0))
    assert "copied late 7 %" in str(_rate(True, 2.0, 1.0, late_copies=7.0))
