"""Streams, events, phases, and arrays of other libraries."""

from dataclasses import replace

import cupy
import pytest
import torch
from on_gpu import SMALL, draw_tokens, make_buffer

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]

CASE = replace(SMALL, tokens=(64,))


def draw(comm):
    torch.manual_seed(comm.rank)
    return draw_tokens(comm, 64, torch.float32)


def test_calls_on_changing_streams_follow_each_other(comm):
    case = replace(CASE, ranks_per_node=comm.size)
    streams = [torch.cuda.Stream() for _ in range(3)]
    with make_buffer(comm, case) as buffer:
        x, topk_idx = draw(comm)
        want = buffer.dispatch(x, topk_idx)
        want_x, sums = want.x.clone(), buffer.combine(want.x, want.handle).x
        torch.cuda.synchronize()
        for i in range(30):
            with torch.cuda.stream(streams[i % 3]):
                got = buffer.dispatch(x, topk_idx, async_op=i % 2 == 0)
                got.event.wait()
                with torch.cuda.stream(streams[(i + 1) % 3]):
                    got.event.wait()
                    home = buffer.combine(got.x, got.handle, async_op=i % 4 == 0)
                    home.event.wait()
                    same = torch.equal(home.x, sums)
                torch.cuda.synchronize()
                assert same
                assert torch.equal(got.x, want_x)
            del got, home


def test_phases_add_up_to_the_call(comm):
    case = replace(CASE, ranks_per_node=comm.size)
    with make_buffer(comm, case) as buffer:
        x, topk_idx = draw(comm)
        first = buffer.dispatch(x, topk_idx)
        cached = buffer.dispatch(x, handle=first.handle)
        home = buffer.combine(first.x, first.handle)
        assert list(first.phases) == ["layout", "announce", "place", "store", "arrive"]
        assert list(cached.phases) == ["announce", "store", "arrive"]
        assert list(home.phases) == ["announce", "reduce", "release"]
        for result in (first, cached, home):
            assert all(0 <= seconds < 1 for seconds in result.phases.values())
            assert sum(result.phases.values()) > 1e-6


def test_phases_of_long_ago_are_not_another_call_s(comm):
    case = replace(CASE, ranks_per_node=comm.size)
    with make_buffer(comm, case) as buffer:
        x, topk_idx = draw(comm)
        first = buffer.dispatch(x, topk_idx)
        for _ in range(70):
            buffer.dispatch(x, handle=first.handle)
        assert first.phases == {}


def test_cupy_arrays_are_adopted(comm):
    case = replace(CASE, ranks_per_node=comm.size)
    with make_buffer(comm, case) as buffer:
        x, topk_idx = draw(comm)
        want = buffer.dispatch(x, topk_idx)
        sums = buffer.combine(want.x, want.handle).x
        out = cupy.zeros((64, CASE.hidden), cupy.float32)
        got = buffer.dispatch(cupy.asarray(x), cupy.asarray(topk_idx))
        buffer.combine(cupy.asarray(got.x), got.handle, out=out)
        assert torch.equal(got.x, want.x)
        assert torch.equal(torch.as_tensor(out, device="cuda"), sums)
        with pytest.raises(TypeError, match="x: expected dtype"):
            buffer.dispatch(cupy.zeros((64, CASE.hidden), cupy.float16), topk_idx)


def test_windows_grow_for_a_wider_combine(comm):
    case = replace(CASE, ranks_per_node=comm.size)
    with make_buffer(comm, case) as buffer:
        x, topk_idx = draw(comm)
        got = buffer.dispatch(x.bfloat16(), topk_idx)
        wide = buffer.combine(got.x.float(), got.handle).x
        narrow = buffer.combine(got.x, got.handle).x
        assert torch.allclose(wide, narrow.float(), rtol=1e-2, atol=1e-2)
