"""The inputs of one rank: rows and routing."""

from dataclasses import dataclass

import torch

from epcomm.routing import make_routing

from .options import Shape


@dataclass(frozen=True)
class Inputs:
    """What a rank sends.

    Attributes:
        x_TH: bfloat16, standard normal.
        topk_idx_TK: int64, global expert ids.
        topk_weights_TK: float32.

    """

    x_TH: torch.Tensor
    topk_idx_TK: torch.Tensor
    topk_weights_TK: torch.Tensor


def _seed(shape: Shape, rank: int, what: int) -> int:
    return (shape.seed * 1_000_003 + rank) * 4 + what


#: Rows drawn; more rows than that repeat them, because drawing takes longer than what is timed.
DRAWN = 1021


def normal_rows(shape: Shape, rank: int, rows: int, what: int) -> torch.Tensor:
    """Draw bfloat16 ``[rows, H]``; the same for the same arguments. ``what`` separates uses."""
    generator = torch.Generator().manual_seed(_seed(shape, rank, what))
    drawn = torch.empty(min(rows, DRAWN), shape.hidden, dtype=torch.bfloat16)
    drawn.normal_(generator=generator)
    return drawn[torch.arange(rows) % DRAWN]


def make_inputs(shape: Shape, rank: int) -> Inputs:
    """Make the inputs of ``rank``; every rank has other tokens, but the same hot experts."""
    routing = make_routing(
        shape.routing,
        shape.tokens,
        shape.experts,
        shape.topk,
        seed=_seed(shape, rank, 0),
        num_groups=shape.groups,
        topk_groups=shape.topk_groups,
        placement_seed=shape.seed,
    )
    x_TH = normal_rows(shape, rank, shape.tokens, 1)
    return Inputs(x_TH, routing.topk_idx_TK, routing.topk_weights_TK)
