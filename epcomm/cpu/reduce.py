"""Both reductions of combine: at the rail peer for its node, and at home over the nodes.

Sums run in float32 from +0, in ascending (local rank, choice) order within a node and ascending
node order at home; a product with a weight is rounded before it is added.

Rows are added up to four at a time, so that the accumulator passes through the cache once for
four rows.
"""

from typing import NamedTuple

import numpy as np

from ..formats.bits import bits_f32, i32
from ..formats.kernels import f32_to_bf16_row, logfmt_pack_row, logfmt_unpack_row
from ..native import constants
from .memory import copy_row, f32_at, fence, kernel, u8_at, u16_at

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
    """Layout of a combine record; ``weight`` is -1 when no top-k weights travel.

    ``stream``: see memory.copy_row; for the results too.
    """

    format: int
    weight: int
    bytes: int
    stream: bool


class Home(NamedTuple):
    """This rank's tokens at the end: the records that came back, biases and the result."""

    inbox_N: np.ndarray
    slot_TN: np.ndarray
    node: int
    bias: np.ndarray
    out: int
    out_weights_TK: np.ndarray


class Terms(NamedTuple):
    """Rows waiting to be added to an accumulator, in order: addresses and factors.

    ``pending[0]`` of them wait; they are added when a group is full or on flush.
    """

    address: np.ndarray
    weight: np.ndarray
    pending: np.ndarray
    weighted: bool


@kernel
def _make_terms(weighted: bool) -> Terms:
    return Terms(
        np.zeros(GROUP, np.int64), np.zeros(GROUP, np.float32), np.zeros(1, np.int64), weighted
    )


@kernel
def _widen(x: int) -> np.float32:
    """Value of a BF16 bit pattern."""
    return bits_f32(i32(i32(x) << 16))


@kernel
def _add_bf16(terms: Terms, acc: np.ndarray) -> None:
    at, n = terms.address, acc.size
    a, b, c, d = u16_at(at[0], n), u16_at(at[1], n), u16_at(at[2], n), u16_at(at[3], n)
    count = terms.pending[0]
    if terms.weighted:
        for j in range(count):
            x, w = u16_at(at[j], n), terms.weight[j]
            for i in range(n):
                acc[i] += w * _widen(x[i])
    elif count == 1:
        for i in range(n):
            acc[i] += _widen(a[i])
    elif count == 2:
        for i in range(n):
            acc[i] = (acc[i] + _widen(a[i])) + _widen(b[i])
    elif count == 3:
        for i in range(n):
            acc[i] = ((acc[i] + _widen(a[i])) + _widen(b[i])) + _widen(c[i])
    else:
        for i in range(n):
            s = ((acc[i] + _widen(a[i])) + _widen(b[i])) + _widen(c[i])
            acc[i] = s + _widen(d[i])


@kernel
def _add_f32(terms: Terms, acc: np.ndarray) -> None:
    n = acc.size
    for j in range(terms.pending[0]):
        x, w = f32_at(terms.address[j], n), terms.weight[j]
        for i in range(n):
            acc[i] += w * x[i]  # a weight of 1 changes no bit


@kernel
def _flush(terms: Terms, row_format: int, acc: np.ndarray) -> None:
    """Add the waiting rows."""
    if terms.pending[0] == 0:
        return
    if row_format == BF16:
        _add_bf16(terms, acc)
    else:
        _add_f32(terms, acc)
    terms.pending[0] = 0


@kernel
def _add_row(terms: Terms, address: int, weight: float, row_format: int, acc: np.ndarray) -> None:
    at = terms.pending[0]
    terms.address[at] = address
    terms.weight[at] = weight
    terms.pending[0] = at + 1
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
def _store(acc: np.ndarray, row_format: int, at: int, stream: bool, scratch: np.ndarray) -> None:
    """Round a sum to its row; ``scratch`` is uint16 [H]."""
    if row_format == F32:
        copy_row(at, acc.ctypes.data, acc.size * 4, stream)
    elif stream:
        f32_to_bf16_row(acc, scratch)
        copy_row(at, scratch.ctypes.data, scratch.size * 2, stream)
    else:
        f32_to_bf16_row(acc, u16_at(at, acc.size))


@kernel
def reduce_records(
    items: np.ndarray, c: Contributions, inputs: Inputs, wire: Wire, outbox: int
) -> None:
    """At the rail peer: sum this node's rows of ``items`` and write their records."""
    num_topk = c.row_CK.shape[1]
    terms = _make_terms(inputs.row_weights_L.max() != 0)
    order = np.empty(num_topk, np.int32)
    acc = np.empty(inputs.hidden, np.float32)
    scratch = np.empty(inputs.hidden, np.uint16)
    for i in items:
        at = outbox + i * wire.bytes
        _sum_item(c, i, inputs, terms, order, acc)
        if wire.format == BF16 or wire.format == F32:
            _store(acc, wire.format, at, wire.stream, scratch)
        else:
            logfmt_pack_row(acc, 8 if wire.format == LOGFMT8 else 10, u8_at(at, wire.bytes))
        if wire.weight >= 0:
            weights_K = f32_at(at + wire.weight, num_topk)
            weights_K[:] = 0.0
            _collect_weights(c, i, inputs, weights_K)
    fence()


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
def _sum_nodes(
    token: int,
    c: Contributions,
    inputs: Inputs,
    wire: Wire,
    home: Home,
    terms: Terms,
    order: np.ndarray,
    part: np.ndarray,
    total: np.ndarray,
) -> None:
    """Sum one token over the nodes, in their order, into ``total``."""
    before = 0  # records of the nodes before this one
    last = np.int64(0)
    for node in range(home.node):
        slot = np.int64(home.slot_TN[token, node])
        if slot >= 0:
            before += 1
            last = home.inbox_N[node] + slot * wire.bytes
    own = home.slot_TN[token, home.node] >= 0
    if own and before <= 1:
        # With one record before it this is a sum of two terms, and either may come first.
        _sum_item(c, token, inputs, terms, order, total)
        if before:
            _add_record(last, wire, terms, part, total)
    else:
        total[:] = 0.0
        for node in range(home.node):
            slot = np.int64(home.slot_TN[token, node])
            if slot >= 0:
                at = home.inbox_N[node] + slot * wire.bytes
                _add_record(at, wire, terms, part, total)
        _flush(terms, wire.format, total)
        if own:
            _sum_item(c, token, inputs, terms, order, part)
            for i in range(inputs.hidden):
                total[i] += part[i]
    for node in range(home.node + 1, home.inbox_N.size):
        slot = np.int64(home.slot_TN[token, node])
        if slot >= 0:
            at = home.inbox_N[node] + slot * wire.bytes
            _add_record(at, wire, terms, part, total)
    _flush(terms, wire.format, total)


@kernel
def _bring_weights_home(
    token: int, c: Contributions, inputs: Inputs, wire: Wire, home: Home
) -> None:
    out_K = home.out_weights_TK[token]
    for node in range(home.inbox_N.size):
        slot = np.int64(home.slot_TN[token, node])
        if slot < 0:
            continue
        if node == home.node:
            _collect_weights(c, token, inputs, out_K)
        else:
            at = home.inbox_N[node] + slot * wire.bytes + wire.weight
            weights_K = f32_at(at, out_K.size)
            for k in range(out_K.size):
                out_K[k] += weights_K[k]


@kernel
def finish_tokens(
    tokens: np.ndarray, c: Contributions, inputs: Inputs, wire: Wire, home: Home
) -> None:
    """At home: sum each token over the nodes, add the biases, round once."""
    terms = _make_terms(inputs.row_weights_L.max() != 0)
    order = np.empty(c.row_CK.shape[1], np.int32)
    part = np.empty(inputs.hidden, np.float32)
    total = np.empty(inputs.hidden, np.float32)
    scratch = np.empty(inputs.hidden, np.uint16)
    row_bytes = inputs.hidden * (2 if inputs.format == BF16 else 4)
    for token in tokens:
        _sum_nodes(token, c, inputs, wire, home, terms, order, part, total)
        for bias in home.bias:
            _add_row(terms, bias + token * row_bytes, np.float32(1.0), inputs.format, total)
        _flush(terms, inputs.format, total)
        if wire.weight >= 0:
            _bring_weights_home(token, c, inputs, wire, home)
        at = home.out + token * row_bytes
        _store(total, inputs.format, at, wire.stream, scratch)
    fence()
