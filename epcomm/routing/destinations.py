"""How many distinct ranks and nodes the tokens of a routing go to."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Destinations(NamedTuple):
    """Mean number of distinct destinations per token."""

    ranks_per_token: float
    nodes_per_token: float


def count_destinations(
    topk_idx_TK: torch.Tensor, num_experts: int, num_ranks: int, ranks_per_node: int
) -> Destinations:
    """Count the distinct destination ranks and nodes per token, on average.

    Experts are placed contiguously: rank ``e // (E / R)``, node ``rank // ranks_per_node``. A
    token's own rank and node count like any other.

    Args:
        topk_idx_TK: integer ``[T, K]``; -1 marks an unused slot.
        num_experts: E, a multiple of R.
        num_ranks: R, a multiple of ``ranks_per_node``.
        ranks_per_node: L.

    Returns:
        Means over the T tokens; zeros when T is 0.

    Raises:
        ValueError: a size does not divide, or an id is outside -1..E-1.
    """
    if num_ranks < 1 or num_experts % num_ranks:
        raise ValueError(f"num_ranks must divide num_experts={num_experts}, got {num_ranks}")
    if ranks_per_node < 1 or num_ranks % ranks_per_node:
        raise ValueError(f"ranks_per_node must divide num_ranks={num_ranks}, got {ranks_per_node}")
    if topk_idx_TK.numel() == 0:
        return Destinations(0.0, 0.0)
    low, high = (int(x) for x in topk_idx_TK.aminmax())
    if low < -1 or high >= num_experts:
        raise ValueError(f"topk_idx_TK must be in -1..{num_experts - 1}, got {low}..{high}")
    experts_per_rank = num_experts // num_ranks
    rank_TK = torch.div(topk_idx_TK, experts_per_rank, rounding_mode="floor")
    node_TK = torch.div(rank_TK, ranks_per_node, rounding_mode="floor")
    return Destinations(
        _mean_distinct(rank_TK, num_ranks), _mean_distinct(node_TK, num_ranks // ranks_per_node)
    )


def _mean_distinct(place_TK: torch.Tensor, num_places: int) -> float:
    # -1 stays -1 under floor division; one extra column swallows it.
    hit_TP = torch.zeros(place_TK.shape[0], num_places + 1, dtype=torch.bool)
    hit_TP.scatter_(1, torch.where(place_TK < 0, num_places, place_TK).long(), True)
    return hit_TP[:, :num_places].sum(dim=1).double().mean().item()
