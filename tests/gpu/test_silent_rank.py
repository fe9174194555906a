"""Ranks that stop calling, and ranks that come too late: the others end, and all stay usable."""

import time
from dataclasses import replace

import pytest
import torch
from on_gpu import SMALL, check, draw_topk, make_buffer

import epcomm

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]

SILENT = 1


def draw(comm):
    x = torch.ones(16, SMALL.hidden, device="cuda", dtype=torch.bfloat16)
    return x, draw_topk(comm, 16)


def needs_two_ranks(comm):
    if comm.size == 1:
        pytest.skip("needs a second rank")


def usable(comm, case):
    """No error of the GPU stays behind, and a new buffer works."""
    torch.cuda.synchronize()
    comm.Barrier()
    with make_buffer(comm, case) as fresh:
        check(comm, case, fresh)


def dispatch(buffer, x, topk_idx, got):
    buffer.dispatch(x, topk_idx)


def dispatch_again(buffer, x, topk_idx, got):
    buffer.dispatch(x, handle=got.handle)
    buffer.check()


def combine(buffer, x, topk_idx, got):
    buffer.combine(got.x, got.handle)
    buffer.check()


def queue_calls(buffer, x, topk_idx, got):
    """Kernels behind the one that gives up must not wait in turn."""
    for _ in range(5):
        buffer.combine(got.x, got.handle)
    buffer.check()


@pytest.mark.parametrize("act", [dispatch, dispatch_again, combine, queue_calls])
def test_a_rank_that_stops_calling_is_named(comm, act):
    needs_two_ranks(comm)
    case, timeout = replace(SMALL, ranks_per_node=comm.size), 1.0
    buffer = make_buffer(comm, case, timeout=timeout, num_sms=2)
    x, topk_idx = draw(comm)
    for _ in range(3):
        got = buffer.dispatch(x, topk_idx)
        buffer.combine(got.x, got.handle)
    if comm.rank != SILENT:
        begin = time.monotonic()
        with pytest.raises(epcomm.PeerTimeoutError) as caught:
            act(buffer, x, topk_idx, got)
        assert caught.value.ranks == (SILENT,)
        assert time.monotonic() - begin < 2 * timeout + 1.0
        with pytest.raises(epcomm.BufferClosedError):
            buffer.dispatch(x, topk_idx)
    comm.Barrier()
    buffer.close()
    usable(comm, case)


@pytest.mark.parametrize("offset", [-0.02, -0.005, 0.0, 0.005, 0.02, 0.3])
def test_a_rank_late_by_about_the_timeout(comm, offset):
    """Some gave up on it and some did not; nobody may use routes that nobody has written."""
    needs_two_ranks(comm)
    case, timeout = replace(SMALL, ranks_per_node=comm.size), 0.3
    buffer = make_buffer(comm, case, timeout=timeout, num_sms=2)
    x, topk_idx = draw(comm)
    got = buffer.dispatch(x, topk_idx)
    torch.cuda.synchronize()
    comm.Barrier()
    if comm.rank == SILENT:
        time.sleep(timeout + offset)
    blamed = None
    try:
        for _ in range(3):
            got = buffer.dispatch(x, topk_idx)
            out = buffer.combine(got.x, got.handle)
        buffer.check()
        assert bool((out.x > 0).all())
    except epcomm.PeerTimeoutError as error:
        blamed = error.ranks
    except epcomm.BufferClosedError as error:
        # Raised by a call after the one that failed.
        blamed = (SILENT,) if f"for rank {SILENT} " in str(error) else ()
    everyone = comm.allgather(blamed)
    if offset >= 0.3:
        assert everyone == [(SILENT,)] * comm.size
    buffer.close()
    usable(comm, case)
