"""Timelines between virtual nodes: the messages of emulated network cards beside kernels' spans."""

from dataclasses import replace

import pytest
from on_gpu import check, make_buffer
from oracle_cases import CASES
from traces import assert_on_their_tracks, begins_of, instants_of

from epcomm.timeline import Trace, merge

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]

PLANES = 2
fabrics = pytest.mark.parametrize(
    "fabric", [f"emulated planes={PLANES}", f"proxy/emulated planes={PLANES}"]
)


@fabrics
def test_the_trace_has_every_message_of_the_calls(world, fabric):
    comm = world(4)
    case = replace(CASES["bf16"], ranks_per_node=2)
    with make_buffer(comm, case, fabric=fabric, timeline=True) as buffer:
        check(comm, case, buffer)
        comm.Barrier()
        buffer.timeline(restart=True)
        nics = buffer._backend._scale_out.fabric
        nics.count(restart=True)
        comm.Barrier()
        check(comm, case, buffer)
        comm.Barrier()
        counted = nics.count()
        trace = buffer.timeline()
        traces = comm.gather(trace.data)
        forgotten = buffer.timeline(restart=True), buffer.timeline()
        comm.Barrier()
    assert trace.ranks[0]["not_shown"] == []
    assert trace.lost == 0
    begins = begins_of(trace)
    assert len(begins) == counted["messages"] > 0
    assert sum(e["args"]["bytes"] for e in begins) == counted["payload_bytes"]
    assert len(begins_of(forgotten[0])) == len(begins)
    assert not begins_of(forgotten[1])
    peer = (comm.rank + 2) % 4
    for event in begins:
        words = event["name"].split()
        assert words[-1] == f"{peer})"
        assert int(words[2]) == int(words[7]) % PLANES  # plane and channel
        # The modelled latency is 2 us.
        assert event["args"]["in the model, us"] >= 2.0
    # Requests of a queue pair in order.
    for name in {e["name"] for e in begins}:
        requests = [e["args"]["request"] for e in begins if e["name"] == name]
        assert requests == sorted(set(requests))
    # By the clock of the kernels. The last messages may be under way when their sender has ended.
    spans = [e for e in trace.events if e["ph"] == "X"]
    first, last = min(e["ts"] for e in spans), max(e["ts"] + e["dur"] for e in spans)
    assert all(first <= e["ts"] <= last + 10_000 for e in begins)
    # Nothing went wrong.
    assert not instants_of(trace)
    if comm.rank == 0:
        merged = merge([Trace(data) for data in traces])
        assert {e["pid"] for e in begins_of(merged)} == {0, 1, 2, 3}


@fabrics
def test_injected_faults_are_on_the_tracks_of_their_cards(world, fabric):
    comm = world(4)
    case = replace(CASES["bf16"], ranks_per_node=2)
    faults = f"{fabric} delay=20 pieces=20 seed=5"
    with make_buffer(comm, case, fabric=faults, timeline=True) as buffer:
        check(comm, case, buffer)
        comm.Barrier()
        trace = buffer.timeline(restart=True)
        after = buffer.timeline()
        comm.Barrier()
    instants = instants_of(trace)
    assert {"fault: delay"} <= {e["name"] for e in instants} <= {"fault: delay", "fault: pieces"}
    assert_on_their_tracks(trace, comm.rank)
    for event in instants:
        details = event["args"]
        assert details["channel"] % PLANES == details["plane"]
        assert details.get("late, us", 0) <= 20
    assert trace.lost == 0
    assert not instants_of(after)
