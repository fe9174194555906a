"""Traces: what their JSON holds, how ranks' clocks meet in one, and what is refused."""

import json
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from epcomm import clocks, timeline
from epcomm.clocks import HostClock, compare_hosts
from epcomm.cpu.phases import HostSpans, Phases
from epcomm.fabric.abi import constants as fabric_constants
from epcomm.fabric.abi import describe_event
from epcomm.fabric.abi import dtypes as fabric_dtypes
from epcomm.timeline import Clock, Lost, Trace, make_trace, merge
from epcomm.trace_events import (
    Channels,
    Span,
    events_of_host,
    events_of_incidents,
    events_of_kernels,
    events_of_messages,
    unroll,
)

pytestmark = pytest.mark.timeout(60)

#: Names of the roles here; a library without CUDA has none.
ROLES = {0: "pack", 1: "put", 2: "forward", 3: "wait", 4: "credit"}
SPAN = np.dtype(
    [("begin", "u8"), ("end", "u8"), ("epoch", "u8"), ("role", "i2"), ("block", "i2"),
     ("warp", "i2"), ("node", "i2"), ("chunk", "i4"), ("items", "i4")]
)  # fmt: skip
#: Keys that each phase of the Trace Event Format needs.
NEEDED = {
    "X": {"name", "pid", "tid", "ts", "dur"},
    "M": {"name", "pid", "args"},
    "C": {"name", "pid", "ts", "args"},
    "i": {"name", "pid", "tid", "ts", "s"},
    "b": {"name", "cat", "id", "pid", "tid", "ts"},
    "e": {"name", "cat", "id", "pid", "tid", "ts"},
}


def span(role: int, begin: int, end: int, *, node: int = -1, chunk: int = -1, warp: int = 0) -> Any:
    return (begin, end, 7, role, 0, warp, node, chunk, 3)


def kernels(rank: int, spans: list[Any], clock: Clock | None = None, **options: Any) -> Trace:
    """A rank's trace; each rank is a node of its own."""
    array = np.array(spans, SPAN)
    base = int(array["begin"].min())
    events = events_of_kernels(array, ROLES, rank, Channels(2, 0, 2), base)
    return make_trace(
        events, base, clock or Clock("one GPU"), rank=rank, node=rank, local_rank=0, **options
    )


def sender(rank: int = 0, clock: Clock | None = None, start: int = 1000) -> Trace:
    pack, put = (0, start, start + 900), (1, start + 500, start + 600)
    return kernels(rank, [span(*pack), span(*put, node=1 - rank, chunk=3)], clock)


def receiver(rank: int = 1, clock: Clock | None = None, start: int = 1000) -> Trace:
    """Two warps wait for the chunk."""
    return kernels(
        rank,
        [
            span(2, start, start + 4000),
            span(3, start + 100, start + 2500, node=1 - rank, chunk=3),
            span(2, start, start + 4000, warp=1),
            span(3, start + 100, start + 2600, node=1 - rank, chunk=3, warp=1),
        ],
        clock,
    )


def check_schema(data: Any) -> None:
    """What Perfetto and chrome://tracing ask for."""
    assert data["displayTimeUnit"] == "ns"
    open_events: dict[Any, int] = {}
    for event in data["traceEvents"]:
        assert NEEDED[event["ph"]] <= set(event)
        if event["ph"] == "X":
            assert event["dur"] >= 0
        if event["ph"] in "be":
            key = event["cat"], event["id"], event["pid"], event["name"]
            open_events[key] = open_events.get(key, 0) + (1 if event["ph"] == "b" else -1)
            assert open_events[key] >= 0
    assert not any(open_events.values())


def named(trace: Trace, name: str) -> list[Any]:
    return [event for event in trace.events if event["name"] == name]


def test_what_is_saved_is_json_that_viewers_take(tmp_path):
    trace = merge([sender(), receiver()])
    trace.save(tmp_path / "trace.json")
    data = json.loads((tmp_path / "trace.json").read_text())
    check_schema(data)
    assert data == trace.data
    assert Trace.load(tmp_path / "trace.json").data == trace.data
    assert [rank["rank"] for rank in trace.ranks] == [0, 1]
    names = {e["args"]["name"] for e in named(trace, "process_name")}
    assert names == {"rank 0 (node 0, local rank 0)", "rank 1 (node 1, local rank 0)"}
    (put,) = named(trace, "put")
    assert put["args"] == {
        "call": 7, "items": 3, "node": 1, "chunk": 3, "channel": 1, "plane": 1,
    }  # fmt: skip


def test_warps_are_counted_by_role():
    trace = kernels(
        0, [span(0, 0, 4), span(0, 1, 2, warp=1), span(4, 0, 3), span(1, 1, 2, node=1, chunk=0)]
    )
    counts = [(e["ts"], e["args"]) for e in named(trace, "warps")]
    assert counts[0] == (0.0, {"pack": 1})
    assert counts[-1] == (0.004, {"pack": 0})
    assert max(args["pack"] for _, args in counts) == 2


def test_a_flight_goes_from_put_to_the_first_arrival():
    trace = merge([sender(), receiver()])
    first, last = [event for event in trace.events if event.get("cat") == "flight"]
    assert (first["ph"], last["ph"]) == ("b", "e")
    assert first["name"] == "chunks to rank 1, channel 1, plane 1"
    assert (first["ts"], last["ts"]) == (0.5, 2.5)


def test_chunks_that_nobody_waited_for_have_no_flight():
    other = kernels(1, [span(2, 1000, 5000)])
    assert not [e for e in merge([sender(), other]).events if e.get("cat") == "flight"]


def test_ranks_of_one_clock_are_not_shifted():
    """However different the comparisons with the host's clock are."""
    clocks_of = [Clock("a GPU", 0, 5000, 100), Clock("a GPU", 100, 9000, 50)]
    trace = merge([sender(0, clocks_of[0]), receiver(1, clocks_of[1], start=1400)])
    assert named(trace, "pack")[0]["ts"] == 0.0
    assert named(trace, "forward")[0]["ts"] == 0.4


def test_clocks_of_gpus_and_hosts_are_brought_together():
    # At the same moment rank 0's GPU says 1000, its host 50'000; rank 1's GPU says 9'000'000 and
    # its host, which is 700'000 ahead, 750'000.
    one = Clock("GPU one", 1000, 50_000, 10)
    other = Clock("GPU two", 9_000_000, 750_000, 10, host_offset_ns=700_000, host_error_ns=99)
    trace = merge([sender(0, one, 1000), receiver(1, other, 9_000_000)])
    assert trace.data["otherData"]["base_ns"] == 50_000
    assert named(trace, "pack")[0]["ts"] == named(trace, "forward")[0]["ts"] == 0.0
    assert trace.ranks[1]["clock"] == asdict(other)


def test_a_shifted_rank_keeps_its_lengths():
    trace = merge([sender(), receiver(start=251_000)])
    assert named(trace, "forward")[0]["ts"] == 250.0
    assert named(trace, "forward")[0]["dur"] == 4.0


def test_losses_are_in_the_picture_and_in_the_numbers():
    trace = kernels(0, [span(0, 5, 9)], lost=Lost(12, 3, 2), not_shown=["the wire"])
    assert trace.lost == 17
    assert named(trace, "12 older spans lost")
    assert named(trace, "3 older messages lost")
    assert named(trace, "2 older events of network cards lost")
    assert trace.ranks[0]["not_shown"] == ["the wire"]
    check_schema(trace.data)
    assert merge([trace, receiver()]).lost == 17


def test_rings_are_unrolled_in_order_of_time():
    rings = np.zeros((2, 4), SPAN)
    # Block 0 has noted 6 spans into 4 places, block 1 two.
    rings["begin"][0] = [50, 60, 30, 40]
    rings["begin"][1] = [35, 45, 0, 0]
    spans, lost = unroll(rings, np.array([6, 2], np.uint64))
    assert spans["begin"].tolist() == [30, 35, 40, 45, 50, 60]
    assert lost == 2


def test_bounded_staging_decides_the_channel():
    assert [Channels(4, 6, 2).of(chunk) for chunk in (0, 5, 6, 11)] == [(0, 0), (1, 1)] * 2
    assert Channels(4, 0, 2).of(7) == (3, 1)


def test_messages_are_named_by_plane_and_queue_pair():
    messages = np.zeros(2, fabric_dtypes["message"])
    for number, message in enumerate(messages):
        message["rung_ns"], message["depart_ns"] = 10_000, 11_000 + 100 * number
        message["arrive_ns"], message["landed_ns"] = 13_000, 13_500
        message["completed_ns"], message["bytes"] = 16_000, 4096
        message["queue_pair"], message["peer"], message["channel"] = 0x101, 1, 2
        message["plane"] = number
    events = events_of_messages(messages, 4, (4, 9), 10_000)
    trace = make_trace(events, 10_000, Clock("host"), rank=4, node=0, local_rank=4)
    check_schema(trace.data)
    name = "NIC plane 0 queue pair 0x101 (channel 2 to rank 9)"
    assert [(e["ph"], e["ts"]) for e in named(trace, name)] == [("b", 0.0), ("e", 6.0)]
    wires = [(e["ph"], e["ts"]) for e in named(trace, "wire")]
    assert wires == [("b", 1.0), ("e", 3.5), ("b", 1.1), ("e", 3.5)]


def test_incidents_are_instants_on_the_track_of_their_card():
    incidents = np.zeros(3, fabric_dtypes["event"])
    incidents["time_ns"], incidents["plane"] = (12_000, 13_500, 13_500), (1, 0, 0)
    incidents["queue_pair"], incidents["peer"], incidents["channel"] = 0x102, 1, 3
    incidents["position"], incidents["amount_ps"] = (7, 9, 8), (2_500_000, 0, 0)
    # A late message; a request changed too early, which ends its queue pair.
    incidents["kind"] = [fabric_constants[name] for name in ("FAULT", "VIOLATION", "FAILED")]
    incidents["code"] = (1, 15, 2)
    events = events_of_incidents(incidents, 4, (4, 9), 10_000)
    check_schema(make_trace(events, 10_000, Clock("host"), rank=4, node=0, local_rank=4).data)
    tracks = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    instants = [e for e in events if e["ph"] == "i"]
    assert [(e["name"], e["ts"], e["tid"], e["pid"]) for e in instants] == [
        ("fault: delay", 2.0, tracks["NIC plane 1"], 4),
        ("violation: slot reused", 3.5, tracks["NIC plane 0"], 4),
        (
            "failed: local queue pair operation error: malformed request",
            *(3.5, tracks["NIC plane 0"], 4),
        ),
    ]
    assert len(set(tracks.values())) == 2
    assert instants[0]["args"] == {
        "queue pair": "0x102", "to rank": 9, "channel": 3, "plane": 1, "request": 7,
        "late, us": 2.5,
    }  # fmt: skip
    assert "late, us" not in instants[1]["args"]
    assert not events_of_incidents(incidents[:0], 4, (4, 9), 0)


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [("FAULT", 99, "fault: unknown"), ("RECOVERED", 0, "doorbell recovered"), (None, 0, "unknown")],
)
def test_what_has_no_name_is_said_to_have_none(kind, code, words):
    assert words in describe_event(fabric_constants[kind] if kind else 77, code)


@pytest.mark.parametrize("modelled", [True, False])
def test_a_modelled_network_is_called_so(modelled):
    trace = make_trace(
        [], 0, Clock("host"), rank=4, node=1, local_rank=0, modelled=modelled
    )  # fmt: skip
    merged = merge([trace])
    check_schema(merged.data)
    (name,) = [e["args"]["name"] for e in merged.events if e["name"] == "process_name"]
    assert ("modelled network" in name) == modelled
    assert [rank["modelled_network"] for rank in merged.ranks] == [modelled]


def test_a_message_of_which_only_the_landing_is_noted_takes_that_time():
    messages = np.zeros(1, fabric_dtypes["message"])
    messages["depart_ns"], messages["arrive_ns"], messages["landed_ns"] = 11_000, 13_000, 13_500
    events = events_of_messages(messages, 0, (0, 1), 10_000)
    check_schema(make_trace(events, 10_000, Clock("a GPU"), rank=0, node=0, local_rank=0).data)
    assert [e["ts"] for e in events] == [1.0, 1.0, 3.5, 3.5]
    assert events[0]["args"] == {
        "bytes": 0, "request": 0, "in the model, us": 2.0, "late, us": 0.5,
    }  # fmt: skip


def test_a_message_that_completed_before_it_landed_does_not_run_backwards():
    messages = np.zeros(1, fabric_dtypes["message"])
    messages["rung_ns"], messages["depart_ns"], messages["completed_ns"] = 1000, 1200, 1100
    times = [e["ts"] for e in events_of_messages(messages, 0, (0, 1), 1000)]
    assert times == sorted(times)


def test_phases_of_the_host_are_spans():
    spans = HostSpans()
    spans.call = 3
    phases = Phases("dispatch", spans)
    phases.mark("layout")
    phases.mark("store")
    kept, lost = spans.read()
    assert lost == 0
    assert [(s.name, s.call) for s in kept] == [("dispatch: layout", 3), ("dispatch: store", 3)]
    assert kept[0].end == kept[1].begin
    # perf_counter is the monotonic clock, which messages and other ranks are by.
    assert abs(kept[1].end - time.monotonic_ns()) < 10**9
    events = events_of_host(kept, 5, kept[0].begin)
    assert next(e["ts"] for e in events if e["ph"] == "X") == 0.0


def test_the_hosts_ring_keeps_the_newest_and_counts_the_rest():
    spans = HostSpans(capacity=4)
    for number in range(7):
        spans.add(f"phase {number}", number, number + 1)
    kept, lost = spans.read()
    assert [s.name for s in kept] == [f"phase {n}" for n in (3, 4, 5, 6)]
    assert lost == 3
    spans.restart()
    assert spans.read() == ([], 0)


def test_no_spans_no_trouble():
    assert events_of_host([], 0, 0)
    trace = make_trace([], 0, Clock("host"), rank=0, node=0, local_rank=0)
    check_schema(merge([trace]).data)
    assert Span(1, 2, "a", 3).end == 2


@pytest.mark.parametrize(
    ("traces", "error", "words"),
    [
        ([], ValueError, "at least one, got none"),
        (lambda: [sender(), sender()], ValueError, r"several of ranks \[0\]"),
        (lambda: [merge([sender(), receiver()])], ValueError, "got one that is merged"),
        ([7], TypeError, "a Trace or a path, got int"),
        ("a.json", TypeError, "a sequence of traces or paths"),
        (lambda: sender(), TypeError, "a sequence of traces or paths"),
    ],
)
def test_bad_input_is_refused(traces, error, words):
    with pytest.raises(error, match=words):
        merge(traces() if callable(traces) else traces)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "a trace that epcomm wrote"),
        ('{"traceEvents": []}', "a trace that epcomm wrote"),
        ('{"traceEvents": [], "otherData": {"base_ns": 1, "ranks": [{}]}}', "that epcomm wrote"),
    ],
)
def test_files_that_are_no_traces_are_named(tmp_path, text, words):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"other.json: .*{words}"):
        merge([path])
    with pytest.raises(FileNotFoundError):
        merge([tmp_path / "none.json"])


def test_the_command_merges_files(tmp_path, capsys):
    paths = []
    for trace in (sender(), receiver()):
        paths.append(str(tmp_path / f"{len(paths)}.json"))
        trace.save(paths[-1])
    timeline._main([str(tmp_path / "all.json"), *paths])
    assert "ranks [0, 1], 0 events lost" in capsys.readouterr().out
    assert len(Trace.load(tmp_path / "all.json").ranks) == 2
    with pytest.raises(SystemExit, match="usage"):
        timeline._main(["all.json"])


class ThreadWorld:
    """Ranks are threads; hosts' clocks are ahead by so many nanoseconds."""

    def __init__(self, skews: list[int], hosts: list[str]) -> None:
        self.skews, self._hosts = skews, hosts
        self._barrier = threading.Barrier(len(skews))
        self._items: list[Any] = [None] * len(skews)
        self.local = threading.local()

    def run(self) -> list[HostClock]:
        results: list[Any] = [None] * len(self.skews)

        def one(rank: int) -> None:
            self.local.skew = self.skews[rank]
            bootstrap: Any = SimpleNamespace(
                rank=rank,
                hosts=lambda: self._hosts,
                allgather=lambda item: self._allgather(rank, item),
            )
            results[rank] = compare_hosts(bootstrap)

        threads = [threading.Thread(target=one, args=(r,)) for r in range(len(self.skews))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def _allgather(self, rank: int, item: Any) -> list[Any]:
        self._items[rank] = item
        self._barrier.wait()
        items = list(self._items)
        self._barrier.wait()
        return items


def test_hosts_clocks_are_compared_within_what_is_said(monkeypatch):
    skews = [0, 5_000_000_000, -3_000_000_000, 40]
    world = ThreadWorld(skews, ["one", "two", "three", "one"])

    class Clocks:
        @staticmethod
        def monotonic_ns() -> int:
            return time.monotonic_ns() + int(world.local.skew)

    monkeypatch.setattr(clocks, "time", Clocks)
    found = world.run()
    for skew, clock in zip(skews[1:3], found[1:3], strict=True):
        assert 0 < clock.error_ns < 500_000_000
        assert abs(clock.offset_ns - skew) <= clock.error_ns
    # On one host there is nothing to estimate.
    assert (found[0].offset_ns, found[0].error_ns) == (0, 0)
    assert (found[3].offset_ns, found[3].error_ns) == (0, 0)
