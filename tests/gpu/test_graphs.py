"""Dispatch and combine captured into CUDA graphs and replayed."""

from dataclasses import replace

import pytest
import torch
from on_gpu import SMALL, check, draw_tokens, make_buffer

import epcomm

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]

CASE = replace(SMALL, tokens=(64,))
TOKENS = 64


def draw(comm, seed):
    torch.manual_seed(seed * comm.size + comm.rank)
    return draw_tokens(comm, TOKENS)


def run(buffer, x, topk_idx, rows, **options):
    got = buffer.dispatch(x, topk_idx, fixed_rows=rows, **options)
    y = got.x.to(torch.bfloat16) * 2
    return got, buffer.combine(y, got.handle)


def expected(buffer, x, topk_idx, rows, **options):
    """The same by calls that are not captured, copied out of the buffer's windows."""
    got, home = run(buffer, x, topk_idx, rows, **options)
    return got.source.clone(), got.tokens_per_expert.clone(), got.num_rows, home.x.clone()


@pytest.mark.parametrize("options", [{}, {"quantize": "fp8"}, {"layout": "expert", "alignment": 8}])
def test_replays_follow_new_inputs_and_routes(comm, options):
    case = replace(CASE, ranks_per_node=comm.size)
    rows = comm.size * TOKENS * CASE.num_topk + 8 * CASE.experts_per_rank
    with make_buffer(comm, case) as buffer:
        x, topk_idx = draw(comm, 0)
        run(buffer, x, topk_idx, rows, **options)  # makes the windows
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got, home = run(buffer, x, topk_idx, rows, **options)
        for seed in range(1, 6):
            fresh_x, fresh_idx = draw(comm, seed)
            source, per_expert, num_rows, sums = expected(
                buffer, fresh_x, fresh_idx, rows, **options
            )
            x.copy_(fresh_x)
            topk_idx.copy_(fresh_idx)
            for _ in range(seed):  # more replays than calls: the host's count does not matter
                graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(got.source, source)
            assert torch.equal(got.tokens_per_expert, per_expert)
            assert got.num_rows == num_rows
            assert torch.equal(home.x.view(torch.int16), sums.view(torch.int16))
        check(comm, case, buffer)
        torch.cuda.synchronize()
        comm.Barrier()


def test_cached_calls_are_captured(comm):
    case = replace(CASE, ranks_per_node=comm.size)
    rows = comm.size * TOKENS
    with make_buffer(comm, case) as buffer:
        x, topk_idx = draw(comm, 0)
        handle = buffer.dispatch(x, topk_idx, fixed_rows=rows).handle
        buffer.combine(buffer.dispatch(x, handle=handle).x, handle)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = buffer.dispatch(x, handle=handle)
            home = buffer.combine(got.x, handle)
        for seed in range(1, 4):
            x.copy_(draw(comm, seed)[0])
            torch.cuda.synchronize()
            again = buffer.dispatch(x, handle=handle)
            sums = buffer.combine(again.x, handle).x
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(got.x.view(torch.int16), again.x.view(torch.int16))
            assert torch.equal(home.x.view(torch.int16), sums.view(torch.int16))


def test_what_a_graph_cannot_hold_is_refused(comm):
    case = replace(CASE, ranks_per_node=comm.size)
    with make_buffer(comm, case) as buffer:
        x, topk_idx = draw(comm, 0)
        buffer.dispatch(x, topk_idx)
        torch.cuda.synchronize()
        with (
            pytest.raises(RuntimeError, match="fixed_rows"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            buffer.dispatch(x, topk_idx)
        torch.cuda.synchronize()
        check(comm, case, buffer)


def raised_by(call):
    """The error of a call, or None."""
    try:
        call()
    except (ValueError, epcomm.EpcommError) as error:
        return error
    return None


def test_bad_ids_of_a_call_that_did_not_wait_are_raised_later(comm):
    case = replace(CASE, ranks_per_node=comm.size)
    rows = comm.size * TOKENS
    with make_buffer(comm, case) as buffer:
        x, topk_idx = draw(comm, 0)
        buffer.dispatch(x, topk_idx, fixed_rows=rows)
        good = topk_idx.clone()
        if comm.rank == 0:
            topk_idx[7, 1] = -5
        # Any of these may raise it, on each rank another one, but on each rank one does.
        results = []
        calls = [
            lambda: results.append(buffer.dispatch(x, topk_idx, fixed_rows=rows)),
            lambda: buffer.dispatch(x, good, fixed_rows=rows),
            lambda: buffer.dispatch(x, good, fixed_rows=rows),
            buffer.check,
        ]
        errors = [error for error in map(raised_by, calls) if error is not None]
        expected = ValueError if comm.rank == 0 else epcomm.PeerError
        assert [type(error) for error in errors] == [expected]
        assert "topk_idx" in str(errors[0])
        results.clear()
        check(comm, case, buffer)


def test_a_handle_of_a_refused_dispatch_moves_nothing(comm):
    case = replace(CASE, ranks_per_node=comm.size)
    with make_buffer(comm, case) as buffer:
        x, topk_idx = draw(comm, 0)
        buffer.dispatch(x, topk_idx, fixed_rows=comm.size * TOKENS)
        # Its rows would lie beyond the window.
        torch.cuda.synchronize()
        handle = Spy(buffer).handle_of(x, topk_idx, fixed_rows=3)
        y = torch.zeros(3, CASE.hidden, device="cuda", dtype=torch.bfloat16)
        errors = [raised_by(lambda: buffer.combine(y, handle)), raised_by(buffer.check)]
        assert any(isinstance(error, ValueError | epcomm.EpcommError) for error in errors)
        check(comm, case, buffer)


class Spy:
    """Gets the handle of a dispatch whose refusal may be raised before the call returns."""

    def __init__(self, buffer):
        self.dispatches = buffer._backend._dispatches
        self.buffer = buffer

    def handle_of(self, x, topk_idx, **options):
        handles = []
        make = self.dispatches._result
        self.dispatches._result = lambda *parts: (
            handles.extend(part for part in parts if isinstance(part, epcomm.Handle))
            or make(*parts)
        )
        raised_by(lambda: self.buffer.dispatch(x, topk_idx, **options))
        self.dispatches._result = make
        return handles[0]


def test_too_few_fixed_rows_are_raised_later(comm):
    case = replace(CASE, ranks_per_node=comm.size)
    with make_buffer(comm, case) as buffer:
        x, topk_idx = draw(comm, 0)
        buffer.dispatch(x, topk_idx, fixed_rows=comm.size * TOKENS)
        errors = [
            raised_by(lambda: buffer.dispatch(x, topk_idx, fixed_rows=3)),
            raised_by(buffer.check),
        ]
        [error] = [error for error in errors if error is not None]
        assert isinstance(error, ValueError)
        assert "fixed_rows" in str(error)
        check(comm, case, buffer)
