"""The GPU benchmark between nodes, run by the CPU back end over emulated NICs of the host.

What needs a GPU is replaced: events by the host's clock, kernels that put triggers by threads.
"""

import json
import time
from functools import partial
from typing import Any

import pytest

from benchmarks import gpu_between
from benchmarks.gpu import check, nodes_cases, runner
from benchmarks.gpu.exchange import Exchange
from benchmarks.gpu.figures import Machine, Table
from benchmarks.gpu.network import Counters
from benchmarks.gpu.nodes_options import parse
from benchmarks.gpu.options import Gpus
from benchmarks.triggers import HostProducers, Sweep
from benchmarks.verify import VerificationError
from epcomm.timeline import Trace

FABRIC = "proxy/emulated rate=1 latency_ns=200000"
SMALL = ["--tokens", "40", "--hidden", "512", "--topk", "3", "--groups", "2", "--calls", "1"]


class _CpuCounters(Counters):
    """A message holds all records of a peer there."""

    def __init__(self, buffer: Any) -> None:
        self._fabric = buffer._backend.node.scale_out._fabric
        self.chunk_records, self.num_chunks = 64, 1
        self.description = self._fabric.describe()


def _by_clock(comm: Any, call: Any, effort: Any) -> float:
    begin = time.perf_counter()
    for turn in range(2):
        call(turn)
    return max(comm.allgather((time.perf_counter() - begin) / 2))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    make = partial(Exchange, device="cpu")
    monkeypatch.setattr(runner, "Exchange", make)
    monkeypatch.setattr(check, "Exchange", make)
    monkeypatch.setattr(nodes_cases, "Counters", _CpuCounters)
    monkeypatch.setattr(nodes_cases, "time_calls", _by_clock)
    monkeypatch.setattr(nodes_cases, "host_time", _by_clock)
    monkeypatch.setattr(gpu_between, "_refusal", lambda fabric: "")
    monkeypatch.setattr(gpu_between, "MESSAGE_HIDDEN", (256,))
    monkeypatch.setattr(gpu_between, "KernelProducers", HostProducers)
    small = Sweep(rings=(1,), threads=(1,), producers=(1,), count=50, repeats=1)
    monkeypatch.setattr(gpu_between, "measure_triggers", partial(_triggers, sweep=small))


_triggers = gpu_between.measure_triggers


def _run(comm: Any, case: str, *more: str) -> gpu_between._Run:
    ranks, nodes = str(comm.size), "2"
    arguments = ["--ranks", ranks, "--nodes", nodes, "--experts", "16", "--sms", "3", *SMALL]
    options = parse([*arguments, "--cases", case, *more])
    run = gpu_between._Run(comm, options, Gpus(1, 132), Table(Machine(1e9, 1), comm.rank == 0))
    for one in options.cases:
        run.case(one)
    assert run.runner.failed == 0
    json.dumps([run.goals.as_list(), run.out.as_dict(), run.triggers.as_dict()])
    return run


@pytest.mark.usefixtures("on_cpu")
def test_proxy_case_counts_bytes_and_triggers(world, capfd):
    run = _run(world(4), "proxy", "--fabric", FABRIC)
    names = [figure.name for figure in run.out.figures]
    assert names == [
        "dispatch BF16",
        "dispatch FP8 pair",
        "dispatch BF16 to FP8",
        "combine BF16",
        "first dispatch FP8 pair",
    ]
    for figure in run.out.figures:
        more = figure.more
        assert 1.0 < more["of least out"] < 2.0  # ids, weights and announcements besides
        assert more["triggers"] == 2  # an announcement, and the records
        assert more["copied %"] > 100 * figure.share > 0
    once = [goal for goal in run.goals.goals if "records for each token" in goal.what]
    assert len(once) == 5
    assert all(goal.outcome == "reached" for goal in once)
    printed = capfd.readouterr().out
    assert ("modelled network" in printed) == (run.world.rank == 0)


@pytest.mark.usefixtures("on_cpu")
def test_line_case_is_judged_by_the_model(world, capfd):
    run = _run(world(4), "line", "--fabric", FABRIC)
    assert [figure.name for figure in run.out.figures] == [
        "dispatch FP8 pair",
        "dispatch BF16 to FP8",
        "combine BF16",
        "first dispatch FP8 pair",
    ]
    for figure in run.out.figures:
        more = figure.more
        # An announcement, the records, a signal after each; and nothing of other calls.
        assert more["messages"] == 4
        # A latency is part of the data phase; both shares are of 1 GB/s.
        assert more["data us"] > 200
        assert 0 < more["data % of line"] < 100
        assert more["data % of line"] == pytest.approx(100 * more["data GB/s"])
        assert more["call % of line"] == pytest.approx(100 * more["call GB/s"])
        assert more["call over ideal"] > 1
    assert len(run.goals.goals) == 6
    printed = capfd.readouterr().out
    if run.world.rank == 0:
        assert printed.count("modelled network, limit:") == 4
        assert "emulated: mlx5 requests, modelled network of 1 GB/s" in printed


@pytest.mark.usefixtures("on_cpu")
def test_a_picture_shows_two_calls_and_what_the_nics_carried(world, tmp_path, capfd):
    comm = world(4)
    path = comm.bcast(str(tmp_path / "trace.json"))
    arguments = ["--ranks", "4", "--nodes", "2", "--experts", "16", "--sms", "3", *SMALL]
    options = parse([*arguments, "--cases", "line", "--fabric", FABRIC, "--timeline", path])
    run = gpu_between._Run(comm, options, Gpus(1, 132), Table(Machine(1e9, 1), comm.rank == 0))
    run.picture(options.timeline)
    assert run.runner.failed == 0
    assert not run.out.figures
    comm.barrier()
    trace = Trace.load(path)
    assert [rank["rank"] for rank in trace.ranks] == [0, 1, 2, 3]
    for rank in range(4):
        names = [e["name"] for e in trace.events if e["pid"] == rank and e["ph"] == "X"]
        assert names.count("dispatch: layout") == names.count("combine: expose") == 1
    messages = [e for e in trace.events if e.get("cat") == "nic" and e["name"] != "wire"]
    # Two announcements of each rank, its records and its sums, a signal after each.
    assert len(messages) == 2 * 4 * 8
    printed = capfd.readouterr().out
    assert ("events of 4 ranks, 0 lost" in printed) == (comm.rank == 0)


@pytest.mark.usefixtures("on_cpu")
def test_network_without_a_model_is_timed_and_not_judged(world):
    run = _run(world(2), "messages", "--fabric", "proxy/local")
    assert {figure.name for figure in run.out.figures} == {
        "dispatch FP8 pair",
        "combine BF16",
        "first dispatch FP8 pair",
    }
    assert all("data % of line" not in figure.more for figure in run.out.figures)
    assert all(figure.more["call GB/s"] > 0 for figure in run.out.figures)


@pytest.mark.usefixtures("on_cpu")
def test_triggers_are_measured_for_every_number_of_ranks(world):
    comm = world(4)
    run = _run(comm, "triggers")
    ranks = {figure.ranks for figure in run.triggers.figures}
    assert ranks == ({2, 4} if comm.rank < 2 else {4})
    for goal in run.goals.goals:
        assert goal.seen is not None
        assert "chunks of" in goal.note
    assert len(run.goals.goals) == 2


@pytest.mark.usefixtures("on_cpu")
def test_wrong_sums_of_another_node_are_found(world):
    comm = world(4)
    shape = parse(["--ranks", "4", "--experts", "16", *SMALL]).on(2)
    with Exchange(comm, shape, 3, device="cpu", fabric=FABRIC) as exchange:
        factors = [exchange.factor(rank) for rank in range(4)]
        sums = exchange.combine(0).x
        check.check_sums(exchange, sums, factors)
        wrong = list(factors)
        wrong[(comm.rank + 2) % 4] *= 1.5
        with pytest.raises(VerificationError, match="rows differ"):
            check.check_sums(exchange, sums, wrong)


@pytest.mark.usefixtures("on_cpu")
def test_fabric_that_the_build_lacks_is_said_and_fails_only_if_asked_for(world, monkeypatch, capfd):
    comm = world(2)
    monkeypatch.setattr(gpu_between, "_refusal", lambda fabric: "fabric: no such thing")
    arguments = ["--ranks", "2", "--experts", "16", *SMALL, "--cases", "line"]
    for more, failed in (([], 0), (["--fabric", "emulated rate=50", "--sms", "3"], 1)):
        options = parse([*arguments, *more])
        out = Table(Machine(1e9, 1), comm.rank == 0)
        run = gpu_between._Run(comm, options, Gpus(1, 132), out)
        run.case("line")
        assert run.runner.failed == failed
        assert out.figures == []
        assert ("not measured: fabric: no such" in capfd.readouterr().out) == (comm.rank == 0)
