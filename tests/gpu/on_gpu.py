"""Runs the cases of the MPI tests' harness with tensors on the GPU."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import harness
import torch
from harness import Case

import epcomm
from epcomm.backend import Config
from epcomm.cuda.rail import largest_record
from epcomm.native import align, constants

#: A small case, where another does not matter.
SMALL = Case(1, hidden=512, experts_per_rank=4, num_topk=3, tokens=(40, 7))


def to_gpu(value: Any) -> Any:
    """Tensors, and tuples and lists of them, on the GPU."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, tuple | list):
        return tuple(to_gpu(v) for v in value)
    return value


def to_host(result: Any) -> Any:
    """A result with its tensors on the host."""
    names = ("x", "scales", "topk_idx", "topk_weights", "source", "tokens_per_expert", "num_rows")
    fields = {name: getattr(result, name, None) for name in (*names, "handle", "traffic")}
    return SimpleNamespace(
        **{n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in fields.items()}
    )


def make_buffer(comm: Any, case: Case, **options: Any) -> epcomm.Buffer:
    """A CUDA buffer for the case."""
    return harness.make_buffer(comm, case, backend="cuda", **options)


def draw_topk(comm: Any, tokens: int) -> torch.Tensor:
    """Experts of so many tokens in the case SMALL."""
    scores = torch.rand(tokens, SMALL.experts_per_rank * comm.size, device="cuda")
    return scores.topk(SMALL.num_topk, dim=1).indices


def draw_tokens(
    comm: Any, tokens: int = 16, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and experts of so many tokens in the case SMALL."""
    x = torch.randn(tokens, SMALL.hidden, device="cuda", dtype=dtype)
    return x, draw_topk(comm, tokens)


def varied(case: Case, seed: int, num_ranks: int, strides: tuple[int, int]) -> Case:
    """Other tokens, routing, format and layout for each seed, the same on all ranks.

    Args:
        case: with the most tokens that a rank may have.
        seed: of the case.
        num_ranks: R.
        strides: by which the numbers of tokens change with the seed and the rank.
    """
    routings = ("uniform", "skewed", "one rank", "sparse")
    (most,), (by_seed, by_rank) = case.tokens, strides
    tokens = tuple(1 + (seed * by_seed + r * by_rank) % most for r in range(num_ranks))
    one = replace(case, seed=seed, tokens=tokens, routing=routings[seed % 4])
    if seed % 3 == 1:
        one = replace(one, quantize="fp8")
    if seed % 5 == 2:
        one = replace(one, layout="expert", alignment=4)
    return one


def bound_for(case: Case, num_ranks: int, records: int) -> int:
    """Bytes of staging that hold so many records of every other node."""
    config = Config(case.hidden, case.num_experts(num_ranks), case.num_topk, max(case.tokens))
    each = align(records * largest_record(config), constants["limit_window_align"])
    return 2 * (num_ranks // case.ranks_per_node - 1) * each


def check(comm: Any, case: Case, buffer: epcomm.Buffer, *, in_place: bool = False) -> None:
    """Run a case, dispatch, combine and cached dispatch, and compare with the oracle."""
    expected = harness.expect(case, comm.size)
    mine, out = expected.inputs[comm.rank], expected.outputs[comm.rank]
    x, weights = to_gpu(mine.x), to_gpu(mine.topk_weights)
    got = buffer.dispatch(
        x,
        to_gpu(mine.topk_idx),
        weights,
        quantize=case.quantize,  # type: ignore[arg-type]
        layout=case.layout,  # type: ignore[arg-type]
        alignment=case.alignment,
        fixed_rows=case.fixed_rows,
    )
    harness.assert_received(to_host(got), expected.received[comm.rank])
    y = to_gpu(out.y)
    if in_place:
        y = buffer.combine_input(got.handle, out.y.dtype).copy_(y)
    back = buffer.combine(
        y,
        got.handle,
        weights=to_gpu(out.weights),
        topk_weights=to_gpu(out.topk_weights),
        bias=to_gpu(tuple(out.bias)),
        wire=case.wire,  # type: ignore[arg-type]
    )
    harness.assert_combined(to_host(back), expected.combined[comm.rank])
    again = buffer.dispatch(x, topk_weights=weights, quantize=case.quantize, handle=got.handle)  # type: ignore[arg-type]
    harness.assert_received(to_host(again), expected.received[comm.rank])
