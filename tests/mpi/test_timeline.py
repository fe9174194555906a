"""Timelines of the CPU back end: phases of calls, and messages of emulated NICs between nodes."""

from itertools import pairwise

import pytest
from harness import Case, check, make_buffer
from refusals import CASE, expect, expect_mismatch
from traces import assert_on_their_tracks, begins_of, instants_of

from epcomm.timeline import Trace, merge

pytestmark = pytest.mark.timeout(120)

SHAPE = Case(2, tokens=(13, 40))
FABRIC = "proxy/emulated"


def spans(trace: Trace, rank: int) -> list[dict]:
    """Phases of a rank's calls, in order."""
    return [e for e in trace.events if e["ph"] == "X" and e["pid"] == rank]


def test_phases_and_messages_are_in_one_trace(world, tmp_path):
    comm = world(4)
    with make_buffer(comm, SHAPE, fabric=FABRIC, timeline=True) as buffer:
        check(comm, SHAPE, buffer)
        mine = buffer.timeline()
        path = tmp_path / "mine.json"
        mine.save(path)
        traces = comm.gather(Trace.load(path).data)
        comm.barrier()
    assert mine.lost == 0
    assert mine.ranks[0]["not_shown"] == []
    assert mine.ranks[0]["modelled_network"]
    if comm.rank != 0:
        return
    merged = merge([Trace(data) for data in traces])
    for rank in range(4):
        phases = spans(merged, rank)
        calls = sorted({e["args"]["call"] for e in phases})
        assert calls == list(range(1, len(calls) + 1))
        assert {"dispatch: store", "combine: reduce at home"} <= {e["name"] for e in phases}
        # They follow each other.
        for one, other in pairwise(phases):
            assert one["ts"] + one["dur"] <= other["ts"] + 0.002  # rounding
    messages = [e for e in merged.events if e.get("cat") == "nic" and e["name"] != "wire"]
    begins = begins_of(merged)
    assert {e["pid"] for e in begins} == {0, 1, 2, 3}
    # Announcements, records and sums, each with its signal.
    assert 8 in {e["args"]["bytes"] for e in begins}
    assert max(e["args"]["bytes"] for e in begins) > 1000
    ends = {e["id"]: e["ts"] for e in messages if e["ph"] == "e"}
    for event in begins:
        rank = event["pid"]
        peer = (rank + 2) % 4  # the same place in the other node
        assert event["name"].startswith("NIC plane 0 queue pair 0x1")
        assert event["name"].endswith(f"to rank {peer})")
        # The modelled latency there and back, 2 us each.
        assert ends[event["id"]] - event["ts"] >= 4.0
        first = spans(merged, rank)[0]
        assert event["ts"] >= first["ts"]
    # An announcement of a rank is rung for before its peer's phase that waits for it ends.
    for rank in range(4):
        peer = (rank + 2) % 4
        ours = min(e["ts"] for e in begins if e["pid"] == rank)
        theirs = next(e for e in spans(merged, peer) if e["name"] == "dispatch: announce")
        assert ours <= theirs["ts"] + theirs["dur"]


def test_injected_faults_are_on_the_track_of_the_card(world):
    comm = world(4)
    fabric = f"{FABRIC} delay=20 late_completion=20 seed=7"
    with make_buffer(comm, SHAPE, fabric=fabric, timeline=True) as buffer:
        check(comm, SHAPE, buffer)
        comm.barrier()
        trace = buffer.timeline(restart=True)
        after = buffer.timeline()
        comm.barrier()
    instants = instants_of(trace)
    assert {e["name"] for e in instants} == {"fault: delay", "fault: late completion"}
    assert {e["args"]["plane"] for e in instants} == {0}
    assert_on_their_tracks(trace, comm.rank)
    assert all(0 < e["args"]["late, us"] <= 20 for e in instants)
    assert trace.lost == 0
    assert not instants_of(after)


def test_restart_shows_later_calls_only(world):
    comm = world(4)
    with make_buffer(comm, SHAPE, fabric=FABRIC, timeline=True) as buffer:
        check(comm, SHAPE, buffer)
        comm.barrier()
        before = spans(buffer.timeline(restart=True), comm.rank)
        comm.barrier()
        assert not spans(buffer.timeline(), comm.rank)
        check(comm, SHAPE, buffer)
        after = spans(buffer.timeline(), comm.rank)
    last = max(e["args"]["call"] for e in before)
    assert min(e["args"]["call"] for e in after) == last + 1


def test_what_a_fabric_does_not_tell_is_said(world):
    comm = world(4)
    with make_buffer(comm, SHAPE, timeline=True) as buffer:
        check(comm, SHAPE, buffer)
        trace = buffer.timeline()
    assert "fabric 'auto' does not tell" in trace.ranks[0]["not_shown"][0]
    assert not trace.ranks[0]["modelled_network"]
    assert spans(trace, comm.rank)


def test_off_by_default_and_said_so(world):
    comm = world(2)
    notes_nothing = pytest.raises(ValueError, match="timeline: this Buffer notes nothing")
    with make_buffer(comm, SHAPE) as buffer, notes_nothing:
        buffer.timeline()
    no_bool = pytest.raises(TypeError, match="restart: expected a bool, got int")
    with make_buffer(comm, SHAPE, timeline=True) as buffer, no_bool:
        buffer.timeline(restart=1)


def test_an_argument_that_is_no_bool_is_refused(world):
    comm = world(2)
    given = 1 if comm.rank == 1 else True
    words = ("timeline:", "expected a bool", "got int")
    expect(comm, 1, lambda: make_buffer(comm, CASE, timeline=given), TypeError, words)


def test_ranks_that_disagree_hear_of_it(world):
    comm = world(2)
    expect_mismatch(
        comm, 1, lambda: make_buffer(comm, CASE, timeline=comm.rank == 1), "timeline=True"
    )
