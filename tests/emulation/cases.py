"""Runs the harness's cases on emulated ranks and compares with the oracle."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from harness import Case, draw_inputs, draw_outputs, make_world, wire_of
from oracle_cases import CASES
from world import EmulatedWorld

from epcomm import oracle
from epcomm.backend import Config
from epcomm.formats.wire import WireFormat

_QUANTIZED = {"fp8": WireFormat.FP8, "fp8_ue8m0": WireFormat.FP8_UE8M0}
_PACKED = {"f32": WireFormat.FP8, "ue8m0": WireFormat.FP8_UE8M0}

#: Many records, none, and few; of all sizes of chunks.
UNEQUAL = replace(CASES["different token counts"], ranks_per_node=2)


def config_of(case: Case, num_ranks: int) -> Config:
    """The buffer's configuration for a case."""
    return Config(case.hidden, case.num_experts(num_ranks), case.num_topk, max(case.tokens))


def formats_of(case: Case) -> tuple[WireFormat, WireFormat]:
    """(format of the input's rows, format of the output's)."""
    given = WireFormat.F32 if case.dtype == torch.float32 else WireFormat.BF16
    if case.packed is not None:
        given = _PACKED[case.packed]
    return given, given if case.quantize is None else _QUANTIZED[case.quantize]


def array_of(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else np.ascontiguousarray(tensor.numpy())


def check_case(
    world: EmulatedWorld,
    case: Case,
    *,
    seed: int = 0,
    warps: int = 2,
    inputs: list[oracle.Input] | None = None,
    refusing: int | None = None,
) -> None:
    """Dispatch, combine, cached dispatch and combine again, as one stream a rank; all compared.

    Rank ``refusing`` refuses a cached dispatch and a combine in between.
    """
    size = len(world.ranks)
    inputs = inputs or draw_inputs(case, size)
    received = oracle.dispatch(inputs, make_world(case, size))
    outputs = draw_outputs(case, received, inputs)
    wire = wire_of(case)
    combined = oracle.combine(outputs, received, inputs, make_world(case, size), wire)
    given, fmt = formats_of(case)
    fixed = -1 if case.fixed_rows is None else case.fixed_rows
    results: list[Any] = []
    refusals = [int(rank.report["refusals"]) for rank in world.ranks]
    for rank, mine, out in zip(world.ranks, inputs, outputs, strict=True):
        x, scales = mine.x if isinstance(mine.x, tuple) else (mine.x, None)
        rows = oracle.to_bytes(x)
        arguments: dict[str, Any] = {
            "scales": None if scales is None else oracle.to_bytes(scales),
            "by_expert": case.layout == "expert",
            "alignment": case.alignment,
            "fixed_rows": fixed,
            "warps": warps,
        }
        topk_idx, weights = mine.topk_idx.numpy(), array_of(mine.topk_weights)
        y = (
            oracle.to_bytes(out.y),
            WireFormat.F32 if case.dtype == torch.float32 else WireFormat.BF16,
        )
        extra: dict[str, Any] = {
            "weights": array_of(out.weights),
            "topk_weights": array_of(out.topk_weights),
            "bias": [oracle.to_bytes(b) for b in out.bias],
            "warps": warps,
        }
        routes = rank.dispatch(rows, given, fmt, topk_idx, weights, **arguments)
        first = rank.combine(routes, *y, wire, **extra)
        if refusing is not None:
            status = int(rank.topology.rank == refusing)
            again: dict[str, Any] = {**arguments, "routes": routes, "status": status}
            rank.dispatch(rows, given, fmt, topk_idx, weights, **again)
            rank.combine(routes, *y, wire, **extra, status=status)
        rank.dispatch(rows, given, fmt, topk_idx, weights, **arguments, routes=routes)
        second = rank.combine(routes, *y, wire, **extra)
        results.append((routes, first, second))
    world.run(seed)
    for rank, before, want, sums, (routes, first, second) in zip(
        world.ranks, refusals, received, combined, results, strict=True
    ):
        assert not rank.report["failed"]
        assert rank.report["refusals"] == before + (0 if refusing is None else 2)
        assert int(routes.rows[rank.topology.rank]) == want.num_rows
        for cached in (False, True):
            got = rank.received(routes, fixed, cached=cached)
            np.testing.assert_array_equal(got["source"], want.source)
            np.testing.assert_array_equal(got["payload"], want.payload)
            np.testing.assert_array_equal(got["scales"], want.scales)
            if want.topk_idx is not None:
                np.testing.assert_array_equal(got["topk_idx"], want.topk_idx)
            if want.topk_weights is not None:
                back = got["topk_weights"].reshape(want.topk_weights.shape)
                np.testing.assert_array_equal(back, want.topk_weights)
        np.testing.assert_array_equal(rank.local_expert_rows, want.tokens_per_expert)
        for out, back in (first, second):
            np.testing.assert_array_equal(out, oracle.to_bytes(sums[0]))
            if sums[1] is not None:
                np.testing.assert_array_equal(back, sums[1])


def queue_dispatch(
    world: EmulatedWorld,
    case: Case,
    *,
    refusing: int | None = None,
    inputs: list[oracle.Input] | None = None,
) -> list[oracle.Input]:
    """A first dispatch on every rank, not yet run; ``refusing``: the rank that refuses it."""
    inputs = inputs or draw_inputs(case, len(world.ranks))
    given, fmt = formats_of(case)
    for rank, mine in zip(world.ranks, inputs, strict=True):
        assert isinstance(mine.x, torch.Tensor)
        rank.dispatch(
            oracle.to_bytes(mine.x),
            given,
            fmt,
            mine.topk_idx.numpy(),
            array_of(mine.topk_weights),
            status=int(rank.topology.rank == refusing),
        )
    return inputs
