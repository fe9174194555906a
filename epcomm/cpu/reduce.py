"""Both reductions of combine: at the rail peer for its node, and at home over the nodes.

Sums run in float32 from +0, in ascending (local rank, choice) order within a node and ascending
node order at home; a product with a weight is rounded before it is added.
"""

from typing import NamedTuple

import numpy as np

from ..formats.bits import bits_f32, i32
from ..formats.kernels import (
    add_bf16_row,
    bf16_to_f32_row,
    f32_to_bf16_row,
    logfmt_pack_row,
    logfmt_unpack_row,
)
from .memory import copy_bytes, f32_at, kernel, u8_at, u16_at

F32, BF16, LOGFMT8, LOGFMT10 = 0, 1, 4, 5


class Contributions(NamedTuple):
    """For each item, the rows of this node that belong to it: expert and row by choice, int32."""

    expert_CK: np.ndarray
    row_CK: np.ndarray


class Inputs(NamedTuple):
    """The node's rows to sum, by local rank: addresses, 0 where a part is absent."""

    x_L: np.ndarray
    row_weights_L: np.ndarray
    topk_weights_L: np.ndarray
    local_of_E: np.ndarray
    format: int
    hidden: int
    by_expert: bool


class Wire(NamedTuple):
    """Layout of a combine record; ``weight`` is -1 when no top-k weights travel."""

    format: int
    weight: int
    bytes: int


class Home(NamedTuple):
    """This rank's tokens at the end: the records that came back, biases and the result."""

    inbox_N: np.ndarray
    slot_TN: np.ndarray
    node: int
    bias: np.ndarray
    out: int
    out_weights_TK: np.ndarray


@kernel
def _add_row(inputs: Inputs, address: int, weight: float, weighted: bool, acc: np.ndarray) -> None:
    n = inputs.hidden
    if inputs.format == BF16:
        x_u16 = u16_at(address, n)
        if weighted:
            for i in range(n):
                acc[i] += np.float32(weight) * bits_f32(i32(i32(x_u16[i]) << 16))
        else:
            add_bf16_row(x_u16, acc)
    else:
        x_f32 = f32_at(address, n)
        if weighted:
            for i in range(n):
                acc[i] += np.float32(weight) * x_f32[i]
        else:
            for i in range(n):
                acc[i] += x_f32[i]


@kernel
def _sum_item(c: Contributions, i: int, inputs: Inputs, order: np.ndarray, acc: np.ndarray) -> None:
    """Sum the rows of item ``i`` into ``acc``; ``order`` is scratch, int32 [K]."""
    count = 0
    for k in range(c.row_CK.shape[1]):
        if c.row_CK[i, k] < 0:
            continue
        local = inputs.local_of_E[c.expert_CK[i, k]]
        at = count
        while at > 0 and inputs.local_of_E[c.expert_CK[i, order[at - 1]]] > local:
            at -= 1
        if (
            not inputs.by_expert
            and at > 0
            and inputs.local_of_E[c.expert_CK[i, order[at - 1]]] == local
        ):
            continue  # one row per (token, rank): an earlier choice brought it
        for j in range(count, at, -1):
            order[j] = order[j - 1]
        order[at] = k
        count += 1
    acc[:] = 0.0
    item_bytes = 2 if inputs.format == BF16 else 4
    for j in range(count):
        row = np.int64(c.row_CK[i, order[j]])
        local = inputs.local_of_E[c.expert_CK[i, order[j]]]
        weight = np.float32(1.0)
        weighted = inputs.row_weights_L[local] != 0
        if weighted:
            weight = f32_at(inputs.row_weights_L[local] + row * 4, 1)[0]
        address = inputs.x_L[local] + row * inputs.hidden * item_bytes
        _add_row(inputs, address, weight, weighted, acc)


@kernel
def _collect_weights(c: Contributions, i: int, inputs: Inputs, out_K: np.ndarray) -> None:
    """Top-k weights of item ``i`` from the ranks of this node that hold the choices."""
    num_topk = out_K.size
    for k in range(num_topk):
        row = np.int64(c.row_CK[i, k])
        if row >= 0:
            base = inputs.topk_weights_L[inputs.local_of_E[c.expert_CK[i, k]]]
            at = row if inputs.by_expert else row * num_topk + k
            out_K[k] = f32_at(base + at * 4, 1)[0]


@kernel
def _encode(acc: np.ndarray, wire: Wire, at: int) -> None:
    if wire.format == F32:
        copy_bytes(at, acc.ctypes.data, acc.size * 4)
    elif wire.format == BF16:
        f32_to_bf16_row(acc, u16_at(at, acc.size))
    else:
        logfmt_pack_row(acc, 8 if wire.format == LOGFMT8 else 10, u8_at(at, wire.bytes))


@kernel
def _decode(at: int, wire: Wire, out: np.ndarray) -> None:
    if wire.format == F32:
        copy_bytes(out.ctypes.data, at, out.size * 4)
    elif wire.format == BF16:
        bf16_to_f32_row(u16_at(at, out.size), out)
    else:
        logfmt_unpack_row(u8_at(at, wire.bytes), 8 if wire.format == LOGFMT8 else 10, out)


@kernel
def reduce_records(
    items: np.ndarray, c: Contributions, inputs: Inputs, wire: Wire, outbox: int
) -> None:
    """At the rail peer: sum this node's rows of ``items`` and write their records."""
    num_topk = c.row_CK.shape[1]
    order = np.empty(num_topk, np.int32)
    acc = np.empty(inputs.hidden, np.float32)
    for i in items:
        at = outbox + i * wire.bytes
        _sum_item(c, i, inputs, order, acc)
        _encode(acc, wire, at)
        if wire.weight >= 0:
            weights_K = f32_at(at + wire.weight, num_topk)
            weights_K[:] = 0.0
            _collect_weights(c, i, inputs, weights_K)


@kernel
def _add_bias(home: Home, token: int, inputs: Inputs, total: np.ndarray) -> None:
    item_bytes = 2 if inputs.format == BF16 else 4
    for b in home.bias:
        address = b + token * inputs.hidden * item_bytes
        _add_row(inputs, address, np.float32(1.0), False, total)


@kernel
def finish_tokens(
    tokens: np.ndarray, c: Contributions, inputs: Inputs, wire: Wire, home: Home
) -> None:
    """At home: sum each token over the nodes, add the biases, round once."""
    num_topk = c.row_CK.shape[1]
    order = np.empty(num_topk, np.int32)
    part = np.empty(inputs.hidden, np.float32)
    total = np.empty(inputs.hidden, np.float32)
    for token in tokens:
        total[:] = 0.0
        for node in range(home.inbox_N.size):
            slot = np.int64(home.slot_TN[token, node])
            if slot < 0:
                continue
            if node == home.node:
                _sum_item(c, token, inputs, order, part)
                if wire.weight >= 0:
                    _collect_weights(c, token, inputs, home.out_weights_TK[token])
            else:
                at = home.inbox_N[node] + slot * wire.bytes
                _decode(at, wire, part)
                if wire.weight >= 0:
                    weights_K = f32_at(at + wire.weight, num_topk)
                    for k in range(num_topk):
                        home.out_weights_TK[token, k] += weights_K[k]
            for i in range(inputs.hidden):
                total[i] += part[i]
        _add_bias(home, token, inputs, total)
        if inputs.format == BF16:
            out_u16 = u16_at(home.out + token * inputs.hidden * 2, inputs.hidden)
            f32_to_bf16_row(total, out_u16)
        else:
            copy_bytes(home.out + token * inputs.hidden * 4, total.ctypes.data, inputs.hidden * 4)
