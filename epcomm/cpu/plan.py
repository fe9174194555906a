"""From everybody's counts to base rows: what every rank of a node computes alike."""

from dataclasses import dataclass

import numpy as np

from ..topology import Topology
from .announce import Counts


@dataclass
class Plan:
    """Where rows go in this node's windows, and how many to expect.

    Attributes:
        rows_R: rows of every rank's output, padding included, int64 [R].
        base_NE: for the source of this rail on each node, the first row of its tokens at each
            expert's rank (layout rank) or expert (layout expert), int64 [N, E]; -1 for experts of
            other nodes.
        stored_LL: rows each local rank (first index) stores at each (second), int64 [L, L]:
            its own tokens' and those its rail peers sent it.
        records_N: records from the rail peer on each node to this one, int64 [N].
        tokens_per_expert: of this rank, int32 [E/R].
        padding: half-open row ranges of this rank that nobody writes.
    """

    rows_R: np.ndarray
    base_NE: np.ndarray
    stored_LL: np.ndarray
    records_N: np.ndarray
    tokens_per_expert: np.ndarray
    padding: list[tuple[int, int]]


def _exclusive_cumsum(a: np.ndarray, axis: int) -> np.ndarray:
    total = np.cumsum(a, axis=axis, dtype=np.int64)
    return total - a


def make_plan(topology: Topology, counts: Counts, by_expert: bool, alignment: int) -> Plan:
    """Compute the plan of a dispatch from all ranks' counts."""
    num_ranks = topology.num_ranks
    ranks_L = topology.rank_of_NL[topology.node]
    per_rank = counts.expert_rows_RE.shape[1] // num_ranks
    experts_REl = counts.expert_rows_RE.astype(np.int64).reshape(num_ranks, num_ranks, per_rank)
    here_RLE = experts_REl[:, ranks_L]  # [source, local rank, local expert]
    if by_expert:
        aligned_RE = -(-experts_REl.sum(axis=0) // alignment) * alignment
        rows_R = aligned_RE.sum(axis=1)
        start_LE = _exclusive_cumsum(aligned_RE[ranks_L], axis=1)
        base_RLE = start_LE + _exclusive_cumsum(here_RLE, axis=0)
        rows_RL = here_RLE.sum(axis=2)
    else:
        rows_R = counts.rank_rows_RR.sum(axis=0, dtype=np.int64)
        rows_RL = counts.rank_rows_RR[:, ranks_L].astype(np.int64)
        base_RLE = np.broadcast_to(_exclusive_cumsum(rows_RL, axis=0)[:, :, None], here_RLE.shape)
    rail = topology.rail
    base_NE = np.full((topology.num_nodes, num_ranks, per_rank), -1, np.int64)
    base_NE[:, ranks_L] = base_RLE[rail]
    local = topology.local_rank
    tokens_E = here_RLE[:, local].sum(axis=0)
    padding = []
    if by_expert:
        ends_E = start_LE[local] + tokens_E
        next_E = np.append(start_LE[local][1:], rows_R[topology.rank])
        padding = [(int(a), int(b)) for a, b in zip(ends_E, next_E, strict=True) if a < b]
    stored_LL = np.stack([rows_RL[rail].sum(axis=0) for rail in topology.rank_of_NL.T])
    return Plan(
        rows_R=rows_R,
        base_NE=base_NE.reshape(topology.num_nodes, -1),
        stored_LL=stored_LL,
        records_N=counts.tokens_RN[rail, topology.node].astype(np.int64),
        tokens_per_expert=tokens_E.astype(np.int32),
        padding=padding,
    )
