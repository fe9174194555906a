"""Are the results right? Checked before anything is timed, at full size and against the oracle.

All metadata of every received row are compared with what the routings of all ranks imply, and the
full rows of some tokens of every rank, dispatched and combined, bit for bit with the oracle.
:func:`verify_small` compares everything, of an exchange small enough for the oracle.
"""

from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from epcomm import oracle
from epcomm.formats.wire import WireFormat
from epcomm.results import CombineResult, DispatchResult

from .epcomm_case import EpcommCase
from .flat import FlatCase
from .options import Shape
from .workload import Inputs, make_inputs, normal_rows

#: Tokens of every rank whose rows are compared in full.
SAMPLE = 8

#: Largest relative difference (norm of the difference / norm) of the flat alternative's sums, which
#: are not rounded between nodes, from epcomm's.
_TOLERANCE = {"bf16": 0.01, "logfmt10": 0.02, "logfmt8": 0.05}


class Done(Protocol):
    """A dispatch and a combine to check; tensors on any device.

    Attributes:
        received: of the dispatch.
        y_MH: what was combined.
        returned: of the combine.

    """

    received: DispatchResult | None
    y_MH: torch.Tensor
    returned: CombineResult | None


class VerificationError(AssertionError):
    """The library, or an alternative, gave a wrong result."""


def _same(name: str, got: Any, expected: Any) -> None:
    if isinstance(got, torch.Tensor):
        got = got.cpu()
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise VerificationError(
            f"{name}: {got.dtype} {list(got.shape)} instead of "
            f"{expected.dtype} {list(expected.shape)}"
        )
    if got.tobytes() != expected.tobytes():
        differ = int((got != expected).reshape(len(got), -1).any(axis=1).sum())
        raise VerificationError(f"{name}: {differ} of {len(got)} rows differ")


def sampled_tokens(tokens: int) -> np.ndarray:
    """Tokens compared in full: the first, the last and evenly between."""
    return np.unique(np.linspace(0, tokens - 1, SAMPLE).astype(np.int64))


def check_metadata(comm: Any, shape: Shape, inputs: Inputs, case: Done) -> None:
    """Compare the metadata of every row this rank received; collective."""
    received = case.received
    assert received is not None
    idx_RTK = np.stack(comm.allgather(inputs.topk_idx_TK.numpy()))
    weights_RTK = np.stack(comm.allgather(inputs.topk_weights_TK.numpy()))
    local_RTK = idx_RTK - comm.rank * shape.experts_per_rank
    here_RTK = (local_RTK >= 0) & (local_RTK < shape.experts_per_rank)
    counts = np.bincount(local_RTK[here_RTK], minlength=shape.experts_per_rank)
    _same("tokens_per_expert", received.tokens_per_expert, counts.astype(np.int32))
    if shape.layout == "rank":
        rank_M, token_M = np.nonzero(here_RTK.any(axis=2))
        local_MK, here_MK = local_RTK[rank_M, token_M], here_RTK[rank_M, token_M]
        expected_idx = np.where(here_MK, local_MK, -1)
        weights = np.where(here_MK, weights_RTK[rank_M, token_M], np.float32(0))
        _same("topk_idx", received.topk_idx, expected_idx)
    else:
        rank_S, token_S, choice_S = np.nonzero(here_RTK)
        order = np.argsort(local_RTK[rank_S, token_S, choice_S], kind="stable")
        rank_M, token_M = rank_S[order], token_S[order]
        weights = weights_RTK[rank_M, token_M, choice_S[order]]
    _same("source", received.source, np.stack([rank_M, token_M], axis=1).astype(np.int32))
    _same("topk_weights", received.topk_weights, weights)
    _same("num_rows", [received.num_rows], [len(rank_M)])


def _picked(case: Done, tokens: np.ndarray) -> torch.Tensor:
    """Which received rows belong to sampled tokens."""
    assert case.received is not None
    token_M = case.received.source[:, 1].long()
    return torch.isin(token_M, torch.from_numpy(tokens).to(token_M.device))


def check_rows(comm: Any, shape: Shape, inputs: Inputs, case: Done, tokens: np.ndarray) -> None:
    """Compare the rows of ``tokens`` of every rank after dispatch and combine; collective.

    The sampled tokens are an exchange of their own, small enough for the oracle. Its rows must be
    those of the large one, in the same order.
    """
    received, returned = case.received, case.returned
    assert received is not None
    assert returned is not None
    x, idx, weights = (t[tokens] for t in (inputs.x_TH, inputs.topk_idx_TK, inputs.topk_weights_TK))
    everyone = [oracle.Input(*given) for given in comm.allgather((x, idx, weights))]
    world = oracle.World(
        node_of=[rank // shape.ranks_per_node for rank in range(shape.ranks)],
        num_experts=shape.experts,
        layout=shape.layout,
        quantize=None if shape.dispatch_format == "bf16" else shape.dispatch_format,
    )
    expected = oracle.dispatch(everyone, world)
    picked = _picked(case, tokens)
    mine = expected[comm.rank]
    _same("received rows", oracle.to_bytes(received.x[picked].cpu()), mine.payload)
    if received.scales is not None:
        _same("received scales", oracle.to_bytes(received.scales[picked].cpu()), mine.scales)
    outputs = [oracle.Outputs(y) for y in comm.allgather(case.y_MH[picked].cpu())]
    wire = WireFormat[shape.combine_format.upper()]
    sums = oracle.combine(outputs, expected, everyone, world, wire)
    got = returned.x.cpu()[tokens]
    _same("combined rows", oracle.to_bytes(got), oracle.to_bytes(sums[comm.rank][0]))


def check_flat(shape: Shape, case: FlatCase, reference: EpcommCase) -> None:
    """Check that an alternative moved the same rows and came to the same sums.

    Its rows are ordered as epcomm's in layout rank; in layout expert there is nothing to compare.
    """
    received, returned = reference.received, reference.returned
    assert received is not None
    assert returned is not None
    if shape.layout != "rank":
        return
    _same(f"{case.name}: source", case.meta_MC[:, 0], received.source[:, 1])
    idx_MK = case.meta_MC[:, 1 : 1 + shape.topk].long()
    _same(f"{case.name}: topk_idx", idx_MK, received.topk_idx)
    weights_MK = case.meta_MC[:, 1 + shape.topk :].view(torch.float32)
    _same(f"{case.name}: topk_weights", weights_MK, received.topk_weights)
    tokens = sampled_tokens(shape.tokens)
    sums, flat = returned.x[tokens].float(), case.out_TH[tokens].float()
    difference = float((sums - flat).norm() / sums.norm().clamp_min(1e-9))
    if difference > _TOLERANCE[shape.combine_format]:
        raise VerificationError(f"{case.name}: sums differ from epcomm's by {difference:.1%}")


def verify_small(comm: Any, shape: Shape) -> None:
    """Compare every byte of a small exchange of the same kind with the oracle; collective."""
    small = replace(shape, tokens=24, hidden=272)
    inputs = make_inputs(small, comm.rank)
    case = EpcommCase(comm, small, inputs)
    case.dispatch()
    assert case.received is not None
    case.y_MH = normal_rows(small, comm.rank, case.received.num_rows, 2)
    case.combine(case.y_MH)
    check_metadata(comm, small, inputs, case)
    check_rows(comm, small, inputs, case, np.arange(small.tokens))
    case.close()
