"""Bad input, silence and lifetimes on the CUDA back end."""

import time
from dataclasses import replace

import pytest
import torch
from on_gpu import SMALL, check, draw_tokens, make_buffer, varied

import epcomm

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]


@pytest.mark.parametrize("value", [-2, 10**6, "duplicate"])
def test_bad_id_is_refused_everywhere(comm, value):
    case = replace(SMALL, ranks_per_node=comm.size)
    with make_buffer(comm, case) as buffer:
        x, topk_idx = draw_tokens(comm)
        bad_rank = comm.size - 1
        if comm.rank == bad_rank:
            topk_idx[5, 1] = topk_idx[5, 0] if value == "duplicate" else value
            with pytest.raises(ValueError, match="topk_idx"):
                buffer.dispatch(x, topk_idx)
        else:
            with pytest.raises(epcomm.PeerError, match=f"rank {bad_rank}"):
                buffer.dispatch(x, topk_idx)
        check(comm, case, buffer)


def test_refused_arguments_and_mismatch(comm):
    case = replace(SMALL, ranks_per_node=comm.size)
    with make_buffer(comm, case) as buffer:
        x, topk_idx = draw_tokens(comm)
        if comm.size > 1:
            with pytest.raises(ValueError if comm.rank == 0 else epcomm.PeerError, match="x"):
                buffer.dispatch(x.cpu() if comm.rank == 0 else x, topk_idx)
            layout = "expert" if comm.rank == 0 else "rank"
            with pytest.raises(epcomm.MismatchError, match="layout"):
                buffer.dispatch(x, topk_idx, layout=layout)
        with pytest.raises(ValueError, match="fixed_rows"):
            buffer.dispatch(x, topk_idx, fixed_rows=1)
        check(comm, case, buffer)


def test_silent_rank_is_named(comm):
    if comm.size == 1:
        pytest.skip("needs a rank to be silent")
    case = replace(SMALL, ranks_per_node=comm.size)
    buffer = make_buffer(comm, case, timeout=2.0)
    x, topk_idx = draw_tokens(comm)
    silent = 1
    if comm.rank != silent:
        begin = time.monotonic()
        with pytest.raises(epcomm.PeerTimeoutError) as caught:
            buffer.dispatch(x, topk_idx)
        assert caught.value.ranks == (silent,)
        assert time.monotonic() - begin < 10.0
        with pytest.raises(epcomm.BufferClosedError):
            buffer.dispatch(x, topk_idx)
    comm.Barrier()
    buffer.close()
    with make_buffer(comm, case) as fresh:
        check(comm, case, fresh)


def test_results_outlive_later_calls_and_the_buffer(comm):
    case = replace(SMALL, ranks_per_node=comm.size)
    with make_buffer(comm, case) as buffer:
        kept = []
        for seed in range(5):
            torch.manual_seed(seed)
            x, topk_idx = draw_tokens(comm)
            result = buffer.dispatch(x, topk_idx)
            kept.append((result.x, result.x.clone()))
    torch.cuda.synchronize()
    comm.Barrier()
    for view, copy in kept:
        assert torch.equal(view.view(torch.int16), copy.view(torch.int16))


def test_changing_sizes_and_routings(comm):
    case = replace(SMALL, ranks_per_node=comm.size, tokens=(64,))
    with make_buffer(comm, case) as buffer:
        for seed in range(24):
            check(comm, varied(case, seed, comm.size, (13, 29)), buffer)


def test_async_calls_follow_their_events(comm):
    case = replace(SMALL, ranks_per_node=comm.size)
    with make_buffer(comm, case) as buffer:
        x, topk_idx = draw_tokens(comm)
        got = buffer.dispatch(x, topk_idx, async_op=True)
        got.event.wait()
        twice = buffer.combine(got.x * 2, got.handle, async_op=True)
        twice.event.wait()
        copies = got.handle._state.routes.dest_ranks
        count = (copies >= 0).sum(dim=1, keepdim=True)
        want = torch.zeros_like(x, dtype=torch.float32)
        for i in range(int(count.max())):
            want += torch.where(i < count, 2 * x.float(), 0)
        assert torch.equal(twice.x, want.to(torch.bfloat16))


def test_buffers_come_and_go(comm):
    case = replace(SMALL, ranks_per_node=comm.size)
    for _ in range(20):
        with (
            make_buffer(comm, case, num_sms=4) as first,
            make_buffer(comm, case, num_sms=4) as second,
        ):
            x, topk_idx = draw_tokens(comm)
            a, b = first.dispatch(x, topk_idx), second.dispatch(x, topk_idx)
            assert torch.equal(a.source, b.source)
            torch.cuda.synchronize()
            comm.Barrier()
