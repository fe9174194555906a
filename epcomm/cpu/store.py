"""Storing one row at its final place in the windows of this node's ranks.

Used by both hops: by the source for the ranks of its own node, and by the rail peer for the
records that reached it over the network.
"""

from typing import NamedTuple

import numpy as np

from .memory import copy_bytes, copy_row, f32_at, i32_at, i64_at, kernel, u8_at


class Rows(NamedTuple):
    """The windows of this node's ranks, as one call lays them out.

    Addresses are indexed by local rank. ``local_of_E`` is the local rank that holds an expert,
    -1 for experts of other nodes; ``base_E`` is the first row, at that rank, of one source's
    tokens (layout rank: the same for all experts of a rank). ``stream``: see memory.copy_row.
    """

    x_L: np.ndarray
    scales_L: np.ndarray
    topk_L: np.ndarray
    weights_L: np.ndarray
    source_L: np.ndarray
    local_of_E: np.ndarray
    payload_bytes: int
    scale_bytes: int
    experts_per_rank: int
    by_expert: bool
    stream: bool


class Row(NamedTuple):
    """One token's row: where its bytes are, and what comes with them."""

    payload: int
    scales: int
    expert_K: np.ndarray
    index_K: np.ndarray
    weight_K: np.ndarray
    source_rank: int
    source_token: int


@kernel
def _store_bytes(rows: Rows, local: int, at: int, row: Row) -> None:
    to = rows.x_L[local] + at * rows.payload_bytes
    copy_row(to, row.payload, rows.payload_bytes, rows.stream)
    copy_bytes(rows.scales_L[local] + at * rows.scale_bytes, row.scales, rows.scale_bytes)
    source = i32_at(rows.source_L[local] + at * 8, 2)
    source[0], source[1] = row.source_rank, row.source_token


@kernel
def _store_choices(rows: Rows, local: int, at: int, row: Row) -> None:
    """Layout rank: the ids and weights of the choices this rank holds, -1 and 0 elsewhere."""
    num_topk = row.expert_K.size
    topk = i64_at(rows.topk_L[local] + at * 8 * num_topk, num_topk)
    weights = f32_at(rows.weights_L[local] + at * 4 * num_topk, num_topk)
    for k in range(num_topk):
        expert = row.expert_K[k]
        if expert >= 0 and rows.local_of_E[expert] == local:
            topk[k] = expert % rows.experts_per_rank
            weights[k] = row.weight_K[k]
        else:
            topk[k] = -1
            weights[k] = 0.0


@kernel
def store_row(rows: Rows, base_E: np.ndarray, row: Row, row_K: np.ndarray) -> None:
    """Store a token's row at every rank of this node that wants it.

    ``row_K`` receives, for each choice held on this node, the row it got; -1 for the others.
    """
    for k in range(row.expert_K.size):
        expert = row.expert_K[k]
        local = rows.local_of_E[expert] if expert >= 0 else -1
        if local < 0:
            row_K[k] = -1
            continue
        at = base_E[expert] + row.index_K[k]
        row_K[k] = at
        if rows.by_expert:
            _store_bytes(rows, local, at, row)
            f32_at(rows.weights_L[local] + at * 4, 1)[0] = row.weight_K[k]
            continue
        first = True
        for earlier in range(k):
            other = row.expert_K[earlier]
            first = first and not (other >= 0 and rows.local_of_E[other] == local)
        if first:
            _store_bytes(rows, local, at, row)
            _store_choices(rows, local, at, row)


@kernel
def clear_rows(rows: Rows, local: int, begin: int, end: int, num_topk: int) -> None:
    """Make rows nobody writes well defined: zero payload, no choice, weight 0, source -1."""
    count = end - begin
    u8_at(rows.x_L[local] + begin * rows.payload_bytes, count * rows.payload_bytes)[:] = 0
    u8_at(rows.scales_L[local] + begin * rows.scale_bytes, count * rows.scale_bytes)[:] = 0
    i32_at(rows.source_L[local] + begin * 8, count * 2)[:] = -1
    if rows.by_expert:
        f32_at(rows.weights_L[local] + begin * 4, count)[:] = 0.0
    else:
        i64_at(rows.topk_L[local] + begin * 8 * num_topk, count * num_topk)[:] = -1
        f32_at(rows.weights_L[local] + begin * 4 * num_topk, count * num_topk)[:] = 0.0
