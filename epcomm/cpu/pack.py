"""First hop of dispatch: the source packs each token once and stores or records it.

A packed row goes straight into the windows of the source's own node and, for every other node
with a destination, into one record of that node's outbox.
"""

from typing import NamedTuple

import numpy as np

from ..formats.kernels import (
    fp8_pack_row_bf16,
    fp8_pack_row_bf16_ue8m0,
    fp8_pack_row_f32,
    fp8_pack_row_f32_ue8m0,
)
from .memory import copy_bytes, copy_row, f32_at, fence, i32_at, kernel, u16_at, u64_at
from .store import Row, Rows, store_row

#: How an input row becomes a payload.
AS_IS, BF16_TO_FP8, BF16_TO_UE8M0, F32_TO_FP8, F32_TO_UE8M0 = range(5)


class Source(NamedTuple):
    """This rank's tokens. ``x`` and ``scales`` are addresses; scales only for a packed pair."""

    x: int
    row_bytes: int
    scales: int
    packing: int
    hidden: int
    expert_TK: np.ndarray
    index_TK: np.ndarray
    weight_TK: np.ndarray
    rank: int


class Outbox(NamedTuple):
    """Records on their way to other nodes: ``address_N[n] + slot_TN[t, n] * bytes``."""

    address_N: np.ndarray
    slot_TN: np.ndarray
    node_of_R: np.ndarray
    local_of_R: np.ndarray
    node: int
    scales: int
    meta: int
    expert: int
    row: int
    weight: int
    bytes: int


@kernel
def _pack(source: Source, token: int, q_u8: np.ndarray, s_u8: np.ndarray) -> None:
    address = source.x + token * source.row_bytes
    if source.packing == BF16_TO_FP8:
        s_f32 = f32_at(s_u8.ctypes.data, s_u8.size // 4)
        fp8_pack_row_bf16(u16_at(address, source.hidden), q_u8, s_f32)
    elif source.packing == BF16_TO_UE8M0:
        fp8_pack_row_bf16_ue8m0(u16_at(address, source.hidden), q_u8, s_u8)
    elif source.packing == F32_TO_FP8:
        s_f32 = f32_at(s_u8.ctypes.data, s_u8.size // 4)
        fp8_pack_row_f32(f32_at(address, source.hidden), q_u8, s_f32)
    elif source.packing == F32_TO_UE8M0:
        fp8_pack_row_f32_ue8m0(f32_at(address, source.hidden), q_u8, s_u8)


@kernel
def _write_record(row: Row, rows: Rows, outbox: Outbox, node: int) -> None:
    num_topk = row.expert_K.size
    at = outbox.address_N[node] + outbox.slot_TN[row.source_token, node] * outbox.bytes
    copy_row(at, row.payload, rows.payload_bytes, rows.stream)
    copy_bytes(at + outbox.scales, row.scales, rows.scale_bytes)
    experts = i32_at(at + outbox.expert, num_topk)
    indices = i32_at(at + outbox.row, num_topk)
    weights = f32_at(at + outbox.weight, num_topk)
    mask = np.uint64(0)
    for k in range(num_topk):
        expert = row.expert_K[k]
        experts[k], weights[k], indices[k] = expert, row.weight_K[k], -1
        if expert >= 0:
            rank = expert // rows.experts_per_rank
            if outbox.node_of_R[rank] == node:
                indices[k] = row.index_K[k]
                mask |= np.uint64(1) << np.uint64(outbox.local_of_R[rank])
    u64_at(at + outbox.meta, 1)[0] = mask
    origin = i32_at(at + outbox.meta + 8, 2)
    origin[0], origin[1] = row.source_rank, row.source_token


@kernel
def pack_tokens(
    tokens: np.ndarray,
    source: Source,
    rows: Rows,
    base_E: np.ndarray,
    outbox: Outbox,
    row_TK: np.ndarray,
) -> None:
    """Pack ``tokens`` (int32 indices) once each: store this node's rows, write others' records.

    ``row_TK`` receives the rows stored on this node.
    """
    q_u8 = np.empty(rows.payload_bytes, np.uint8)
    s_u8 = np.empty(max(rows.scale_bytes, 1), np.uint8)[: rows.scale_bytes]
    for token in tokens:
        if source.packing == AS_IS:
            payload = source.x + token * source.row_bytes
            scales = source.scales + token * rows.scale_bytes
        else:
            _pack(source, token, q_u8, s_u8)
            payload = q_u8.ctypes.data
            scales = s_u8.ctypes.data
        row = Row(
            payload,
            scales,
            source.expert_TK[token],
            source.index_TK[token],
            source.weight_TK[token],
            source.rank,
            token,
        )
        for node in range(outbox.address_N.size):
            if node != outbox.node and outbox.slot_TN[token, node] >= 0:
                _write_record(row, rows, outbox, node)
        store_row(rows, base_E, row, row_TK[token])
    fence()
