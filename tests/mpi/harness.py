"""What the tests of dispatch and combine share: inputs of a world, runs, comparison to the oracle.

Every rank draws the inputs of all ranks from one seed, so that the oracle needs no communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

import epcomm
from epcomm import oracle
from epcomm.formats import quantize_fp8
from epcomm.formats.constants import TILE
from epcomm.formats.wire import WireFormat


@dataclass(frozen=True)
class Case:
    """One dispatch and combine, over all ranks.

    Attributes:
        routing: "uniform", "skewed" (low experts are hot), "one rank" (all tokens to rank 0's
            experts), "sparse" (most choices dropped) or "dropped" (all of them).
        tokens: per rank, repeated as needed.
        values: of rows: "normal"; "any magnitude": tiles of zeros, and around any power of two,
            subnormals included, that leaves room for sums; "around zero": zeros of both signs, and
            BF16's smallest numbers.
        packed: pass a (FP8, scales) pair with these scales: "f32" or "ue8m0".
    """

    ranks_per_node: int
    hidden: int = 64
    experts_per_rank: int = 4
    num_topk: int = 3
    tokens: tuple[int, ...] = (17,)
    routing: str = "uniform"
    dtype: torch.dtype = torch.bfloat16
    quantize: str | None = None
    packed: str | None = None
    layout: str = "rank"
    alignment: int = 1
    fixed_rows: int | None = None
    with_weights: bool = True
    row_weights: bool = False
    num_bias: int = 0
    wire: str | None = None
    values: str = "normal"
    seed: int = 0

    def num_experts(self, num_ranks: int) -> int:
        return self.experts_per_rank * num_ranks

    def tokens_of(self, rank: int) -> int:
        return self.tokens[rank % len(self.tokens)]


def draw_topk(case: Case, num_ranks: int, rank: int, rng: np.random.Generator) -> torch.Tensor:
    """Distinct experts per token, int64 [T, K], some dropped."""
    num_experts = case.num_experts(num_ranks)
    scores = rng.gumbel(size=(case.tokens_of(rank), num_experts))
    if case.routing == "skewed":
        scores -= 2.0 * np.log1p(np.arange(num_experts))
    if case.routing == "one rank":
        scores[:, : max(case.experts_per_rank, case.num_topk)] += 1000.0
    topk = np.argsort(-scores, axis=1)[:, : case.num_topk]
    share = {"sparse": 0.8, "dropped": 1.0}.get(case.routing, 0.1)
    dropped = rng.random(topk.shape) < share
    return torch.from_numpy(np.where(dropped, -1, topk))


def draw_rows(rows: int, case: Case, rng: np.random.Generator) -> torch.Tensor:
    values = rng.standard_normal((rows, case.hidden), np.float32) * np.float32(3.0)
    if case.values == "any magnitude":
        shape = (rows, -(-case.hidden // TILE), 1)
        exponent = rng.uniform(-148, 110, shape) - rng.exponential(1, (*shape[:2], TILE)) * (
            rng.integers(0, 12, shape)
        )
        scale = 2.0**exponent * (rng.random(shape) > 0.1)
        scale = scale.reshape(rows, shape[1] * TILE)[:, : case.hidden]
        values = (values * scale).astype(np.float32)
    if case.values == "around zero":
        least = np.float32(2.0**-133)
        values = rng.choice(
            np.array([-0.0, -0.0, -0.0, 0.0, least, -least], np.float32), values.shape
        )
    return torch.from_numpy(values).to(case.dtype)


def draw_inputs(case: Case, num_ranks: int) -> list[oracle.Input]:
    """The dispatch inputs of all ranks."""
    inputs = []
    for rank in range(num_ranks):
        rng = np.random.default_rng([case.seed, rank])
        topk = draw_topk(case, num_ranks, rank, rng)
        x: Any = draw_rows(len(topk), case, rng)
        if case.packed is not None:
            x = quantize_fp8(x, case.packed)
        weights = torch.from_numpy(rng.random(topk.shape, np.float32))
        inputs.append(oracle.Input(x, topk, weights if case.with_weights else None))
    return inputs


def make_world(case: Case, num_ranks: int) -> oracle.World:
    return oracle.World(
        node_of=[r // case.ranks_per_node for r in range(num_ranks)],
        num_experts=case.num_experts(num_ranks),
        layout=case.layout,
        alignment=case.alignment,
        quantize=case.quantize,
        fixed_rows=case.fixed_rows,
    )


def draw_outputs(
    case: Case, received: Sequence[oracle.Received], inputs: Sequence[oracle.Input]
) -> list[oracle.Outputs]:
    """The combine inputs of all ranks."""
    outputs = []
    for rank, got in enumerate(received):
        rng = np.random.default_rng([case.seed, rank, 1])
        rows = len(got.routes)
        shape = (rows,) if case.layout == "expert" else (rows, case.num_topk)
        outputs.append(
            oracle.Outputs(
                draw_rows(rows, case, rng),
                torch.from_numpy(rng.random(rows, np.float32)) if case.row_weights else None,
                torch.from_numpy(rng.random(shape, np.float32)) if case.with_weights else None,
                [draw_rows(len(inputs[rank].topk_idx), case, rng) for _ in range(case.num_bias)],
            )
        )
    return outputs


def make_buffer(comm: Any, case: Case, **options: Any) -> epcomm.Buffer:
    options.setdefault("timeout", 30.0)
    return epcomm.Buffer(
        comm,
        hidden=case.hidden,
        num_experts=case.num_experts(comm.size),
        num_topk=case.num_topk,
        max_tokens=max(case.tokens),
        ranks_per_node=case.ranks_per_node,
        **options,
    )


def assert_received(got: epcomm.DispatchResult, want: oracle.Received) -> None:
    """Bit equality of everything a dispatch returns."""
    assert got.num_rows == want.num_rows
    np.testing.assert_array_equal(got.source.numpy(), want.source)
    np.testing.assert_array_equal(oracle.to_bytes(got.x), want.payload)
    if got.scales is None:
        assert want.scales.shape[1] == 0
    else:
        np.testing.assert_array_equal(oracle.to_bytes(got.scales), want.scales)
    np.testing.assert_array_equal(got.tokens_per_expert.numpy(), want.tokens_per_expert)
    for mine, theirs in ((got.topk_idx, want.topk_idx), (got.topk_weights, want.topk_weights)):
        if theirs is None:
            assert mine is None
        else:
            assert mine is not None
            np.testing.assert_array_equal(mine.numpy(), theirs)


def assert_combined(
    got: epcomm.CombineResult, want: tuple[torch.Tensor, np.ndarray | None]
) -> None:
    """Bit equality of sums and weights."""
    np.testing.assert_array_equal(oracle.to_bytes(got.x), oracle.to_bytes(want[0]))
    if want[1] is None:
        assert got.topk_weights is None
    else:
        assert got.topk_weights is not None
        np.testing.assert_array_equal(got.topk_weights.numpy(), want[1])


def wire_of(case: Case) -> WireFormat:
    default = "bf16" if case.dtype == torch.bfloat16 else "f32"
    return WireFormat[(case.wire or default).upper()]


@dataclass(frozen=True)
class Expected:
    """A case's exchange, by rank: what ranks dispatch and what comes of it, likewise combine."""

    inputs: list[oracle.Input]
    received: list[oracle.Received]
    outputs: list[oracle.Outputs]
    combined: list[tuple[torch.Tensor, np.ndarray | None]]


# Of the last test's cases, two at most: the next one often has the same, over another fabric.
# Nobody writes to it.
@lru_cache(maxsize=2)
def expect(case: Case, num_ranks: int) -> Expected:
    """What the oracle says of a case."""
    inputs, world = draw_inputs(case, num_ranks), make_world(case, num_ranks)
    received = oracle.dispatch(inputs, world)
    outputs = draw_outputs(case, received, inputs)
    combined = oracle.combine(outputs, received, inputs, world, wire_of(case))
    return Expected(inputs, received, outputs, combined)


def check(comm: Any, case: Case, buffer: epcomm.Buffer | None = None, **options: Any) -> None:
    """Run a case on ``comm`` and compare every output with the oracle.

    Without ``buffer`` one is made with ``options``.
    """
    buffer = buffer or make_buffer(comm, case, **options)
    expected = expect(case, comm.size)
    mine, out = expected.inputs[comm.rank], expected.outputs[comm.rank]
    got = buffer.dispatch(
        mine.x,
        mine.topk_idx,
        mine.topk_weights,
        quantize=case.quantize,  # type: ignore[arg-type]
        layout=case.layout,  # type: ignore[arg-type]
        alignment=case.alignment,
        fixed_rows=case.fixed_rows,
    )
    assert_received(got, expected.received[comm.rank])
    back = buffer.combine(
        out.y,
        got.handle,
        weights=out.weights,
        topk_weights=out.topk_weights,
        bias=tuple(out.bias),
        wire=case.wire,  # type: ignore[arg-type]
    )
    assert_combined(back, expected.combined[comm.rank])
    again = buffer.dispatch(
        mine.x, topk_weights=mine.topk_weights, quantize=case.quantize, handle=got.handle
    )  # type: ignore[arg-type]
    assert_received(again, expected.received[comm.rank])


def nodes_of(size: int) -> list[int]:
    """Ranks per node that divide a world of ``size``."""
    return [n for n in range(1, size + 1) if size % n == 0]
