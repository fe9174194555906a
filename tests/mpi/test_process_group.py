"""A torch.distributed process group (gloo) gives the same bytes as an MPI communicator."""

import datetime
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from harness import Case, check, draw_inputs, make_buffer, nodes_of

import epcomm
from epcomm.oracle import to_bytes

CASE = Case(1, hidden=144, tokens=(9, 0, 14), quantize="fp8", num_bias=1)


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    """A gloo group of all launched ranks, over a file."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    folder = tempfile.TemporaryDirectory() if world.rank == 0 else None
    path = world.bcast(folder.name if folder else None)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}/store",
        rank=world.rank,
        world_size=world.size,
        timeout=datetime.timedelta(seconds=60),
    )
    yield dist.group.WORLD
    dist.destroy_process_group()
    world.Barrier()
    if folder:
        folder.cleanup()


class Sized:
    """A process group with the two attributes the harness asks a communicator for."""

    def __init__(self, group: Any) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)


def buffer_on(group: Any, case: Case, **options: Any) -> epcomm.Buffer:
    return epcomm.Buffer(
        group,
        hidden=case.hidden,
        num_experts=case.num_experts(dist.get_world_size(group)),
        num_topk=case.num_topk,
        max_tokens=max(case.tokens),
        ranks_per_node=case.ranks_per_node,
        **{"timeout": 30.0, **options},
    )


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_equals_the_oracle(comm, group, layout):
    for shape in nodes_of(comm.size):
        case = replace(CASE, ranks_per_node=shape, layout=layout)
        with buffer_on(group, case) as buffer:
            check(Sized(group), case, buffer)
            check(Sized(group), replace(case, seed=1), buffer)


def test_equals_mpi(comm, group):
    for shape in nodes_of(comm.size):
        case = replace(CASE, ranks_per_node=shape)
        given = draw_inputs(case, comm.size)[comm.rank]
        with buffer_on(group, case) as one, make_buffer(comm, case) as other:
            results = []
            for buffer in (one, other):
                recv = buffer.dispatch(given.x, given.topk_idx, given.topk_weights)
                back = buffer.combine(recv.x, recv.handle, wire="logfmt10")
                results.append((to_bytes(recv.x).tobytes(), to_bytes(back.x).tobytes()))
                assert recv.traffic.records >= 0
            assert results[0] == results[1]


def test_two_buffers_on_one_group(comm, group):
    """Their messages share the group's connections and must not meet."""
    small = replace(CASE, ranks_per_node=nodes_of(comm.size)[0])
    large = replace(small, hidden=656, tokens=(40,), seed=3)
    with buffer_on(group, small) as one, buffer_on(group, large) as other:
        for _ in range(3):
            check(Sized(group), small, one)
            check(Sized(group), large, other)


def test_a_new_buffer_after_a_silent_rank(comm, group):
    """Messages of the failed call are still under way; the new buffer must not take them."""
    if comm.size == 1:
        pytest.skip("nobody waits")
    case = replace(CASE, ranks_per_node=1, tokens=(24,))
    given = draw_inputs(case, comm.size)[comm.rank]
    buffer = buffer_on(group, case, timeout=2.0)
    comm.Barrier()
    if comm.rank != comm.size - 1:
        with pytest.raises(epcomm.PeerTimeoutError) as caught:
            buffer.dispatch(given.x, given.topk_idx, given.topk_weights)
        assert caught.value.ranks == (comm.size - 1,)
    comm.Barrier()
    with buffer_on(group, case) as anew:
        check(Sized(group), case, anew)
    buffer.close()


def test_a_new_buffer_after_an_absent_rank(comm, group):
    """Messages of the Buffer that was not made are still under way; the new one must not take them.

    Nobody hears over gloo that others gave up, so each rank ends by its own deadline.
    """
    if comm.size == 1:
        pytest.skip("nobody waits")
    case = replace(CASE, ranks_per_node=1)
    for turn in range(2):
        comm.Barrier()
        if comm.rank == comm.size - 1:
            time.sleep(3.0)
        with pytest.raises(epcomm.PeerTimeoutError, match="no sign of rank"):
            buffer_on(group, case, timeout=2.0)
        comm.Barrier()
        with buffer_on(group, case) as anew:
            check(Sized(group), replace(case, seed=turn), anew)


def test_bad_input_is_told_over_gloo(comm, group):
    for shape in nodes_of(comm.size):
        case = replace(CASE, ranks_per_node=shape)
        given = draw_inputs(case, comm.size)[comm.rank]
        with buffer_on(group, case) as buffer:
            bad = comm.rank == comm.size - 1
            layout = "none" if bad else "rank"
            with pytest.raises(ValueError if bad else epcomm.PeerError, match="layout"):
                buffer.dispatch(given.x, given.topk_idx, given.topk_weights, layout=layout)
            check(Sized(group), case, buffer)


def test_world_as_a_store_is_refused(comm):
    """The store a process group is made from is no process group."""
    with pytest.raises(TypeError, match="group: expected an mpi4py communicator or a torch"):
        epcomm.Buffer(dist.HashStore(), hidden=16, num_experts=8, num_topk=1, max_tokens=1)
