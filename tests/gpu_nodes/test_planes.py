"""Ranks with several emulated network cards, of which one is late or dies."""

import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from harness import Case
from on_gpu import check, make_buffer

import epcomm

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]

BASE = Case(2, hidden=512, experts_per_rank=4, num_topk=4, tokens=(300, 0, 41))
#: Its chunks hold 64 records, so a channel has few requests in a call.
CALLS = 6


def check_calls(comm, buffer, ranks_per_node):
    for seed in range(CALLS):
        case = replace(BASE, ranks_per_node=ranks_per_node, seed=seed)
        check(comm, replace(case, quantize="fp8") if seed % 2 else case, buffer)
    buffer.check()


@pytest.mark.parametrize("planes", [2, 4])
@pytest.mark.parametrize(("ranks_per_node", "num_ranks"), [(2, 4), (1, 4), (1, 2)])
def test_order_between_planes_is_not_noticed(world, planes, ranks_per_node, num_ranks):
    comm = world(num_ranks)
    fabric = f"emulated planes={planes} delay=200 pieces=100 late_completion=100 seed={planes}"
    case = replace(BASE, ranks_per_node=ranks_per_node)
    with make_buffer(comm, case, fabric=fabric, timeout=20.0) as buffer:
        check_calls(comm, buffer, ranks_per_node)


#: Of a whole call, most of the time; what else keeps a message on its way is a hundredth of it.
SLOW_PLANE, SLOW_US = 1, 500


@pytest.mark.parametrize("fabric", ["emulated", "emulated failover=1", "proxy/emulated"])
@pytest.mark.parametrize("planes", [2, 4])
@pytest.mark.parametrize(("ranks_per_node", "num_ranks"), [(2, 4), (1, 4), (1, 2)])
def test_slow_plane_is_not_noticed(world, planes, fabric, ranks_per_node, num_ranks):
    comm = world(num_ranks)
    fabric += f" planes={planes} slow_plane={SLOW_PLANE} slow_us={SLOW_US}"
    case = replace(BASE, ranks_per_node=ranks_per_node)
    # With a timeline the cards keep what became of each message.
    with make_buffer(comm, case, fabric=fabric, timeout=20.0, timeline=True) as buffer:
        check_calls(comm, buffer, ranks_per_node)
        comm.Barrier()
        nics = buffer._backend._scale_out.fabric
        messages, _ = nics.messages()
        assert nics.lost_planes == ()  # late is not dead
        everyones = np.concatenate(comm.allgather(messages))
    assert_slow(everyones)


def assert_slow(messages):
    """Every message of one plane was late, in the model and in fact, and none of the others."""
    is_slow = messages["plane"] == SLOW_PLANE
    assert is_slow.any()
    assert not is_slow.all()
    landed_us = (messages["landed_ns"] - messages["depart_ns"]) / 1e3
    modelled_us = (messages["arrive_ns"] - messages["depart_ns"]) / 1e3
    assert landed_us[is_slow].min() >= SLOW_US
    assert modelled_us[~is_slow].max() < SLOW_US


@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("planes", [2, 4])
@pytest.mark.parametrize(("ranks_per_node", "num_ranks"), [(2, 4), (1, 4), (1, 2)])
def test_plane_that_dies_is_not_noticed(world, planes, first, ranks_per_node, num_ranks):
    comm = world(num_ranks)
    fabric = f"emulated planes={planes} failover=1 dead_plane=1 dead_from={first} retry_us=200"
    case = replace(BASE, ranks_per_node=ranks_per_node)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with make_buffer(comm, case, fabric=fabric, timeout=20.0) as buffer:
            check_calls(comm, buffer, ranks_per_node)
    told = sum("other planes take over" in str(warning.message) for warning in caught)
    assert comm.allreduce(told) > 0


def call_until_it_fails(buffer):
    for _ in range(CALLS):
        x = torch.randn(300, BASE.hidden, device="cuda", dtype=torch.bfloat16)
        topk_idx = torch.rand(300, 16, device="cuda").topk(4).indices
        got = buffer.dispatch(x, topk_idx)
        buffer.combine(got.x, got.handle)
        buffer.check()


def test_dead_plane_is_an_error_by_default(world):
    comm = world(4)
    fabric = "emulated planes=2 dead_plane=1 dead_from=1 retry_us=200"
    buffer = make_buffer(comm, BASE, fabric=fabric, timeout=2.0)
    begin = time.monotonic()
    with pytest.raises(epcomm.EpcommError):
        call_until_it_fails(buffer)
    assert time.monotonic() - begin < 15.0
    comm.Barrier()
    buffer.close()
    with make_buffer(comm, BASE, fabric="emulated planes=2") as fresh:
        check(comm, BASE, fresh)
