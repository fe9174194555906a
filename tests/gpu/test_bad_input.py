"""Bad tensors on one rank: refused there, told to all, and the buffer stays usable."""

from dataclasses import replace

import pytest
import torch
from on_gpu import SMALL, check, draw_topk, make_buffer

import epcomm

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]

CASE = replace(SMALL, tokens=(16,))
TOKENS = 16


def shifted(x):
    """The same values, contiguous, one element after a multiple of 16 bytes."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return flat[1:].view(x.shape).copy_(x)


def strided(x):
    return x.t().contiguous().t()


class Given:
    """Good arguments of a dispatch and a combine, to spoil one of."""

    def __init__(self, comm):
        self.x = torch.ones(TOKENS, CASE.hidden, device="cuda", dtype=torch.bfloat16)
        self.topk_idx = draw_topk(comm, TOKENS)
        self.topk_weights = torch.rand(TOKENS, CASE.num_topk, device="cuda")


DISPATCH = {
    "x on the CPU": (lambda g: setattr(g, "x", g.x.cpu()), "x: expected a tensor on cuda:0"),
    "topk_idx on the CPU": (
        lambda g: setattr(g, "topk_idx", g.topk_idx.cpu()),
        "topk_idx: expected a tensor on cuda:0, got one on cpu",
    ),
    "topk_weights on the CPU": (
        lambda g: setattr(g, "topk_weights", g.topk_weights.cpu()),
        "topk_weights: expected a tensor on cuda:0, got one on cpu",
    ),
    "x not contiguous": (lambda g: setattr(g, "x", strided(g.x)), "x: expected a contiguous"),
    "topk_idx not contiguous": (
        lambda g: setattr(g, "topk_idx", strided(g.topk_idx)),
        "topk_idx: expected a contiguous",
    ),
    "x between units": (lambda g: setattr(g, "x", shifted(g.x)), "x: .* multiple of 16 bytes"),
}


@pytest.mark.parametrize("name", DISPATCH)
def test_a_bad_dispatch_is_refused_everywhere(comm, name):
    spoil, words = DISPATCH[name]
    case, bad = replace(CASE, ranks_per_node=comm.size), comm.size - 1
    with make_buffer(comm, case) as buffer:
        given = Given(comm)
        if comm.rank == bad:
            spoil(given)
            with pytest.raises(ValueError, match=words):
                buffer.dispatch(given.x, given.topk_idx, given.topk_weights)
        else:
            with pytest.raises(epcomm.PeerError, match=words) as caught:
                buffer.dispatch(given.x, given.topk_idx, given.topk_weights)
            assert caught.value.ranks == (bad,)
        check(comm, case, buffer)


COMBINE = {
    "x on the CPU": (lambda y, out: {"x": y.cpu()}, "x: expected a tensor on cuda:0"),
    "x not contiguous": (lambda y, out: {"x": strided(y)}, "x: expected a contiguous"),
    "x between units": (lambda y, out: {"x": shifted(y)}, "x: .* multiple of 16 bytes"),
    "out between units": (lambda y, out: {"out": shifted(out)}, "out: .* multiple of 16 bytes"),
    "bias between units": (lambda y, out: {"bias": shifted(out)}, "bias: .* multiple of 16 bytes"),
    "bias on the CPU": (lambda y, out: {"bias": out.cpu()}, "bias: expected a tensor on cuda:0"),
}


@pytest.mark.parametrize("name", COMBINE)
def test_a_bad_combine_is_refused_everywhere(comm, name):
    """The others hear of it by check, or at the end of their next call."""
    spoil, words = COMBINE[name]
    case, bad = replace(CASE, ranks_per_node=comm.size), comm.size - 1
    with make_buffer(comm, case) as buffer:
        for told_by_check in (True, False):
            given = Given(comm)
            got = buffer.dispatch(given.x, given.topk_idx)
            # One row at least, so that its address counts.
            y = torch.ones_like(got.x)
            if comm.rank == bad:
                arguments = {"x": y, "handle": got.handle, **spoil(y, given.x)}
                with pytest.raises(ValueError, match=words):
                    buffer.combine(**arguments)
                if not told_by_check:
                    buffer.dispatch(given.x, given.topk_idx)
            else:
                buffer.combine(y, got.handle)
                if told_by_check:
                    with pytest.raises(epcomm.PeerError, match=words) as caught:
                        buffer.check()
                    assert caught.value.ranks == (bad,)
                else:
                    torch.cuda.synchronize()
                    with pytest.raises(epcomm.PeerError, match=words):
                        buffer.dispatch(given.x, given.topk_idx)
            got = buffer.dispatch(given.x, given.topk_idx)
            buffer.combine(got.x, got.handle)
            buffer.check()
        check(comm, case, buffer)
