"""Both reductions of combine: at the rail peer for its node, and at home over the nodes.

Sums run in float32 from +0, in ascending (local rank, choice) order within a node and ascending
node order at home; a product with a weight is rounded before it is added.

Rows are added four at a time, so that the accumulator passes through the cache once for four rows.
A group with fewer is filled up with a row of zeros: a sum that starts from +0 is never -0, and to
anything else adding +0 changes no bit. Likewise a weight of 1 changes none.
"""

from typing import NamedTuple

import numpy as np

from ..formats.bits import bits_f32, i32
from ..formats.kernels import f32_to_bf16_row, logfmt_pack_row, logfmt_unpack_row
from ..native import constants
from .memory import copy_bytes, f32_at, kernel, u8_at, u16_at

F32, BF16 = constants["FORMAT_F32"], constants["FORMAT_BF16"]
LOGFMT8 = constants["FORMAT_LOGFMT8"]
GROUP = 4


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


class Terms(NamedTuple):
    """Rows to add to an accumulator, in order: addresses, factors, and the row of zeros.

    ``count[0]`` of them are pending; they are added when a group is full or on flush.
    """

    address: np.ndarray
    weight: np.ndarray
    count: np.ndarray
    zeros: np.ndarray


@kernel
def _make_terms(hidden: int) -> Terms:
    return Terms(
        np.zeros(GROUP, np.int64),
        np.zeros(GROUP, np.float32),
        np.zeros(1, np.int64),
        np.zeros(hidden * 4, np.uint8),
    )


@kernel
def _add_bf16(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, w: np.ndarray, acc: np.ndarray
) -> None:
    wa, wb, wc, wd = w[0], w[1], w[2], w[3]
    for i in range(acc.size):
        s = acc[i] + wa * bits_f32(i32(i32(a[i]) << 16))
        s = s + wb * bits_f32(i32(i32(b[i]) << 16))
        s = s + wc * bits_f32(i32(i32(c[i]) << 16))
        acc[i] = s + wd * bits_f32(i32(i32(d[i]) << 16))


@kernel
def _add_f32(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, w: np.ndarray, acc: np.ndarray
) -> None:
    wa, wb, wc, wd = w[0], w[1], w[2], w[3]
    for i in range(acc.size):
        acc[i] = (((acc[i] + wa * a[i]) + wb * b[i]) + wc * c[i]) + wd * d[i]


@kernel
def _flush(terms: Terms, row_format: int, acc: np.ndarray) -> None:
    """Add the pending rows."""
    if terms.count[0] == 0:
        return
    for i in range(terms.count[0], GROUP):
        terms.address[i] = terms.zeros.ctypes.data
        terms.weight[i] = 1.0
    n, at, w = acc.size, terms.address, terms.weight
    if row_format == BF16:
        _add_bf16(u16_at(at[0], n), u16_at(at[1], n), u16_at(at[2], n), u16_at(at[3], n), w, acc)
    else:
        _add_f32(f32_at(at[0], n), f32_at(at[1], n), f32_at(at[2], n), f32_at(at[3], n), w, acc)
    terms.count[0] = 0


@kernel
def _add_row(terms: Terms, address: int, weight: float, row_format: int, acc: np.ndarray) -> None:
    at = terms.count[0]
    terms.address[at] = address
    terms.weight[at] = weight
    terms.count[0] = at + 1
    if at + 1 == GROUP:
        _flush(terms, row_format, acc)


@kernel
def _order_choices(c: Contributions, i: int, inputs: Inputs, order: np.ndarray) -> int:
    """Choices of item ``i`` whose rows are summed, by (local rank, choice); returns how many."""
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
    return count


@kernel
def _sum_item(
    c: Contributions, i: int, inputs: Inputs, terms: Terms, order: np.ndarray, acc: np.ndarray
) -> None:
    """Sum this node's rows of item ``i`` into ``acc``; ``order`` is scratch, int32 [K]."""
    count = _order_choices(c, i, inputs, order)
    row_bytes = inputs.hidden * (2 if inputs.format == BF16 else 4)
    acc[:] = 0.0
    for j in range(count):
        row = np.int64(c.row_CK[i, order[j]])
        local = inputs.local_of_E[c.expert_CK[i, order[j]]]
        weight = np.float32(1.0)
        if inputs.row_weights_L[local] != 0:
            weight = f32_at(inputs.row_weights_L[local] + row * 4, 1)[0]
        _add_row(terms, inputs.x_L[local] + row * row_bytes, weight, inputs.format, acc)
    _flush(terms, inputs.format, acc)


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
def _store(acc: np.ndarray, row_format: int, at: int) -> None:
    if row_format == BF16:
        f32_to_bf16_row(acc, u16_at(at, acc.size))
    else:
        copy_bytes(at, acc.ctypes.data, acc.size * 4)


@kernel
def reduce_records(
    items: np.ndarray, c: Contributions, inputs: Inputs, wire: Wire, outbox: int
) -> None:
    """At the rail peer: sum this node's rows of ``items`` and write their records."""
    num_topk = c.row_CK.shape[1]
    terms = _make_terms(inputs.hidden)
    order = np.empty(num_topk, np.int32)
    acc = np.empty(inputs.hidden, np.float32)
    for i in items:
        at = outbox + i * wire.bytes
        _sum_item(c, i, inputs, terms, order, acc)
        if wire.format == BF16 or wire.format == F32:
            _store(acc, wire.format, at)
        else:
            logfmt_pack_row(acc, 8 if wire.format == LOGFMT8 else 10, u8_at(at, wire.bytes))
        if wire.weight >= 0:
            weights_K = f32_at(at + wire.weight, num_topk)
            weights_K[:] = 0.0
            _collect_weights(c, i, inputs, weights_K)


@kernel
def _add_record(at: int, wire: Wire, terms: Terms, scratch: np.ndarray, total: np.ndarray) -> None:
    """Add a record that came back to the total."""
    if wire.format == BF16 or wire.format == F32:
        _add_row(terms, at, np.float32(1.0), wire.format, total)
    else:
        logfmt_unpack_row(u8_at(at, wire.bytes), 8 if wire.format == LOGFMT8 else 10, scratch)
        for i in range(total.size):
            total[i] += scratch[i]


@kernel
def _collect_home_weights(token: int, wire: Wire, home: Home, at: int) -> None:
    num_topk = home.out_weights_TK.shape[1]
    weights_K = f32_at(at + wire.weight, num_topk)
    for k in range(num_topk):
        home.out_weights_TK[token, k] += weights_K[k]


@kernel
def finish_tokens(
    tokens: np.ndarray, c: Contributions, inputs: Inputs, wire: Wire, home: Home
) -> None:
    """At home: sum each token over the nodes, add the biases, round once."""
    terms = _make_terms(inputs.hidden)
    order = np.empty(c.row_CK.shape[1], np.int32)
    part = np.empty(inputs.hidden, np.float32)
    total = np.empty(inputs.hidden, np.float32)
    row_bytes = inputs.hidden * (2 if inputs.format == BF16 else 4)
    for token in tokens:
        empty = True  # total still is the +0 that any sum starts from
        for node in range(home.inbox_N.size):
            slot = np.int64(home.slot_TN[token, node])
            if slot < 0:
                continue
            if node == home.node:
                _flush(terms, wire.format, total)
                _sum_item(c, token, inputs, terms, order, total if empty else part)
                if not empty:
                    for i in range(inputs.hidden):
                        total[i] += part[i]
                if wire.weight >= 0:
                    _collect_weights(c, token, inputs, home.out_weights_TK[token])
            else:
                if empty:
                    total[:] = 0.0
                at = home.inbox_N[node] + slot * wire.bytes
                _add_record(at, wire, terms, part, total)
                if wire.weight >= 0:
                    _collect_home_weights(token, wire, home, at)
            empty = False
        if empty:
            total[:] = 0.0
        _flush(terms, wire.format, total)
        for bias in home.bias:
            _add_row(terms, bias + token * row_bytes, np.float32(1.0), inputs.format, total)
        _flush(terms, inputs.format, total)
        _store(total, inputs.format, home.out + token * row_bytes)
