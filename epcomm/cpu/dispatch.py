"""Dispatch on the CPU: layout, announce, pack, forward, arrive.

The steps are in the files of those names; this one puts them in order.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..backend import DispatchCall
from ..formats.wire import WireFormat
from ..native import RecordLayout, constants, dispatch_record
from ..results import DispatchResult, Event, Handle, Labels
from ..traffic import LinkBytes, LinkTraffic, Traffic
from .announce import Counts, name_window
from .control import Waiting
from .forward import Inbox, forward_records
from .layout import BadChoice, Layout, make_layout
from .memory import STREAM_BYTES
from .node import Node
from .pack import (
    AS_IS,
    BF16_TO_FP8,
    BF16_TO_UE8M0,
    F32_TO_FP8,
    F32_TO_UE8M0,
    Outbox,
    Source,
    pack_tokens,
)
from .phases import Phases
from .plan import Plan, make_plan
from .reduce import Contributions
from .scaleout import Request, Tag
from .store import Rows, clear_rows
from .window import RowParts, combine_parts, dispatch_parts

_PACKING = {
    (torch.bfloat16, WireFormat.FP8): BF16_TO_FP8,
    (torch.bfloat16, WireFormat.FP8_UE8M0): BF16_TO_UE8M0,
    (torch.float32, WireFormat.FP8): F32_TO_FP8,
    (torch.float32, WireFormat.FP8_UE8M0): F32_TO_UE8M0,
}
_ROW_DTYPE = {
    WireFormat.F32: torch.float32,
    WireFormat.BF16: torch.bfloat16,
    WireFormat.FP8: torch.float8_e4m3fn,
    WireFormat.FP8_UE8M0: torch.float8_e4m3fn,
}


@dataclass
class Routes:
    """What a handle keeps: enough to send the same way again and to come back.

    Attributes:
        epoch: the dispatch that made it.
        expert_TK: global expert ids, int32 [T, K].
        layout, plan: as the dispatch computed them.
        tokens_by_reach: this rank's tokens with a destination on another node, then the others.
        own: for every token, the rows it got on this node.
        forwarded: for every source node, the rows its records got on this node.
    """

    epoch: int
    by_expert: bool
    alignment: int
    fixed_rows: int
    expert_TK: np.ndarray
    layout: Layout
    plan: Plan
    tokens_by_reach: tuple[np.ndarray, np.ndarray]
    own: Contributions
    forwarded: dict[int, Contributions]

    def rows_of(self, rank: int) -> int:
        """Rows of a rank's output."""
        return self.fixed_rows if self.fixed_rows >= 0 else int(self.plan.rows_R[rank])


def choose(node: Node, call: DispatchCall) -> tuple[np.ndarray, Layout]:
    """Layout of a first dispatch: (expert_TK, layout).

    Raises:
        ValueError: an id is out of range or twice in a row of ``topk_idx``.
    """
    assert call.topk_idx is not None
    topk_idx_TK = np.ascontiguousarray(call.topk_idx.numpy(), dtype=np.int64)
    layout = make_layout(
        topk_idx_TK, node.topology.node_of_R, node.config.num_experts, call.layout == "expert"
    )
    if isinstance(layout, BadChoice):
        raise layout.error(topk_idx_TK, node.config.num_experts)
    return topk_idx_TK.astype(np.int32), layout


class Dispatch:
    """One dispatch under way."""

    def __init__(self, node: Node, call: DispatchCall) -> None:
        """Do what can fail on this rank alone.

        Raises:
            ValueError: an id is out of range or twice in a row of ``topk_idx``; more fixed rows
                than a window can hold.
            OSError: no memory for the output.
        """
        self.node = node
        self.call = call
        self.phases = Phases("dispatch", node.spans)
        config = node.config
        self.record: RecordLayout = dispatch_record(call.format, config.hidden, config.num_topk)
        self.by_expert = call.layout == "expert"
        if call.fixed_rows is not None:
            self._check_window(call.fixed_rows)
        self.lease = node.windows.lease("dispatch")
        if call.handle is None:
            self.expert_TK, self.layout = choose(node, call)
        self.phases.mark("layout")

    def run(self, epoch: int, arrived_L: np.ndarray) -> DispatchResult:
        """Do the rest; see Buffer.dispatch for what is raised.

        ``arrived_L`` counts, over all calls, the rows each local rank stored here.
        """
        self.epoch = epoch
        self.arrived_L = arrived_L
        routes, headers = self._announce()
        rows = self._rows(headers, routes)
        received = self._move(routes, rows)
        self._arrive(routes, rows)
        handle = self.call.handle
        if handle is None:
            num_rows = routes.rows_of(self.node.topology.rank)
            handle = Handle(
                self.node.topology, routes, self.call.x.shape[0], num_rows, self.call.layout
            )
        return self._result(routes, handle, received)

    # Announce -----------------------------------------------------------------------------

    def _announce(self) -> tuple[Routes, np.ndarray]:
        node, call = self.node, self.call
        cached = call.handle is not None
        self.op = constants["OP_CACHED_DISPATCH" if cached else "OP_DISPATCH"]
        header = node.announcer.header(self.op, self.epoch)
        header["format"] = call.format
        header["layout"] = constants["LAYOUT_EXPERT" if self.by_expert else "LAYOUT_RANK"]
        header["alignment"] = call.alignment
        header["with_weights"] = call.topk_weights is not None
        header["fixed_rows"] = -1 if call.fixed_rows is None else call.fixed_rows
        header["num_tokens"] = call.x.shape[0]
        name_window(header, self.lease.segment, self.lease.serial)
        if call.handle is not None:
            routes: Routes = call.handle._state
            header["handle_epoch"] = routes.epoch
            headers, _ = node.announcer.exchange(header)
        else:
            layout = self.layout
            sent = (layout.node_tokens_N, layout.rank_rows_R, layout.expert_rows_E)
            headers, counts = node.announcer.exchange(header, sent)
            routes = self._routes(counts)
            self._check_fit(routes)
        self.phases.mark("announce")
        return routes, headers

    def _routes(self, counts: Counts) -> Routes:
        call, topology = self.call, self.node.topology
        elsewhere_TN = self.layout.slot_TN >= 0
        elsewhere_TN[:, topology.node] = False
        far = elsewhere_TN.any(axis=1)
        return Routes(
            epoch=self.epoch,
            by_expert=self.by_expert,
            alignment=call.alignment,
            fixed_rows=-1 if call.fixed_rows is None else call.fixed_rows,
            expert_TK=self.expert_TK,
            layout=self.layout,
            plan=make_plan(topology, counts, self.by_expert, call.alignment),
            tokens_by_reach=(
                np.flatnonzero(far).astype(np.int32),
                np.flatnonzero(~far).astype(np.int32),
            ),
            own=Contributions(self.expert_TK, np.empty_like(self.expert_TK)),
            forwarded={},
        )

    def _check_fit(self, routes: Routes) -> None:
        if routes.fixed_rows < 0:
            return
        over = np.flatnonzero(routes.plan.rows_R > routes.fixed_rows)
        if over.size:
            rank = int(over[0])
            raise ValueError(
                f"fixed_rows: {routes.fixed_rows} is too few, nothing was sent: rank {rank} "
                f"would receive {int(routes.plan.rows_R[rank])} rows"
            )

    def _check_window(self, rows: int) -> None:
        config, window = self.node.config, self.node.windows.nbytes
        back = combine_parts(rows, 4 * config.hidden, config.num_topk, self.by_expert)
        needed = max(self._parts(rows).nbytes, back.nbytes)
        if needed > window:
            raise ValueError(
                f"fixed_rows: {rows} rows need {needed} bytes with float32 rows on the way back, "
                f"but a window has {window}, enough for all that max_tokens={config.max_tokens} "
                "lets a rank receive"
            )

    def _parts(self, rows: int) -> RowParts:
        record, num_topk = self.record, self.node.config.num_topk
        return dispatch_parts(
            rows, record.payload_bytes, record.scale_bytes, num_topk, self.by_expert
        )

    def _rows(self, headers: np.ndarray, routes: Routes) -> Rows:
        node = self.node
        what = Waiting(self.op, constants["PHASE_DATA"], self.epoch)
        me = node.topology.local_rank
        needed_L = routes.plan.stored_LL[me] > 0
        needed_L[me] = True
        windows_L = node.window_addresses(headers, needed_L, what)
        parts_L = [self._parts(routes.rows_of(rank)) for rank in node.topology.node_ranks]

        def at(part: str) -> np.ndarray:
            return windows_L + np.array([getattr(parts, part) for parts in parts_L], np.int64)

        return Rows(
            x_L=at("x"),
            scales_L=at("scales"),
            topk_L=at("topk"),
            weights_L=at("weights"),
            source_L=at("source"),
            local_of_E=node.local_of_E,
            payload_bytes=self.record.payload_bytes,
            scale_bytes=self.record.scale_bytes,
            experts_per_rank=node.experts_per_rank,
            by_expert=self.by_expert,
            stream=int(routes.plan.stored_LL[node.topology.local_rank].sum())
            * self.record.payload_bytes
            > STREAM_BYTES,
        )

    # Data ---------------------------------------------------------------------------------

    def _move(self, routes: Routes, rows: Rows) -> int:
        """Pack, send, store, forward. Returns the scale-out messages sent."""
        node, topology = self.node, self.node.topology
        what = Waiting(self.op, constants["PHASE_DATA"], self.epoch)
        receives, inbox_N = self._post_receives(routes)
        outbox, outbox_rows = self._outbox(routes)
        source = self._source(routes)
        base_E = routes.plan.base_NE[topology.node]
        far, near = routes.tokens_by_reach
        row_TK = routes.own.row_CK
        node.for_items(pack_tokens, far, source, rows, base_E, outbox, row_TK)
        sends: dict[int, Request] = {
            topology.rail[n]: node.scale_out.send(topology.rail[n], Tag.DATA, data)
            for n, data in outbox_rows.items()
        }
        self.phases.mark("pack and send")
        node.for_items(pack_tokens, near, source, rows, base_E, outbox, row_TK)
        self.phases.mark("store")

        def forward(peer: int) -> None:
            self.phases.mark("wait for records")
            n = topology.node_of[peer]
            count = int(routes.plan.records_N[n])
            shape = (count, node.config.num_topk)
            got = routes.forwarded.setdefault(
                n, Contributions(np.empty(shape, np.int32), np.empty(shape, np.int32))
            )
            items = np.arange(count, dtype=np.int32)
            node.for_items(forward_records, items, inbox_N[n], rows, routes.plan.base_NE[n], *got)
            self.phases.mark("forward")

        node.control.wait_requests(receives, what, forward)
        node.control.wait_requests(sends, what)
        self.phases.mark("wait for records")
        return len(sends)

    def _post_receives(self, routes: Routes) -> tuple[dict[int, Request], dict[int, Inbox]]:
        node, record = self.node, self.record
        receives: dict[int, Request] = {}
        inboxes: dict[int, Inbox] = {}
        for n, count in enumerate(routes.plan.records_N):
            if n == node.topology.node or count == 0:
                continue
            peer = node.topology.rail[n]
            memory = node.scale_out.inbox(peer, int(count) * record.bytes)
            into = memory.reshape(int(count), record.bytes)
            receives[peer] = node.scale_out.receive(peer, Tag.DATA, into)
            inboxes[n] = Inbox(
                memory.ctypes.data, record.scales, record.meta, record.expert, record.row,
                record.weight, record.bytes,
            )  # fmt: skip
        return receives, inboxes

    def _outbox(self, routes: Routes) -> tuple[Outbox, dict[int, np.ndarray]]:
        node, record = self.node, self.record
        address_N = np.zeros(node.topology.num_nodes, np.int64)
        data: dict[int, np.ndarray] = {}
        for n, count in enumerate(routes.layout.node_tokens_N):
            if n == node.topology.node or count == 0:
                continue
            memory = node.scale_out.outbox(node.topology.rail[n], int(count) * record.bytes)
            address_N[n] = memory.ctypes.data
            data[n] = memory.reshape(int(count), record.bytes)
        outbox = Outbox(
            address_N=address_N,
            slot_TN=routes.layout.slot_TN,
            node_of_R=node.topology.node_of_R,
            local_of_R=node.topology.local_of_R,
            node=node.topology.node,
            scales=record.scales,
            meta=record.meta,
            expert=record.expert,
            row=record.row,
            weight=record.weight,
            bytes=record.bytes,
        )
        return outbox, data

    def _source(self, routes: Routes) -> Source:
        call = self.call
        if call.topk_weights is None:
            weight_TK = np.zeros(routes.expert_TK.shape, np.float32)
        else:
            weight_TK = call.topk_weights.numpy()
        return Source(
            x=call.x.data_ptr(),
            row_bytes=call.x.shape[1] * call.x.element_size(),
            scales=0 if call.scales is None else call.scales.data_ptr(),
            packing=_PACKING.get((call.x.dtype, call.format), AS_IS),
            hidden=self.node.config.hidden,
            expert_TK=routes.expert_TK,
            index_TK=routes.layout.index_TK,
            weight_TK=weight_TK,
            rank=self.node.topology.rank,
        )

    # Arrive -------------------------------------------------------------------------------

    def _arrive(self, routes: Routes, rows: Rows) -> None:
        """Tell the node's ranks what was stored for them; wait for what they store here."""
        node, plan = self.node, routes.plan
        me = node.topology.local_rank
        for local, stored in enumerate(plan.stored_LL[me]):
            if stored:
                node.control.signal(local, "arrived", me, int(stored))
        num_rows = int(plan.rows_R[node.topology.rank])
        tail = [(num_rows, routes.fixed_rows)] if routes.fixed_rows > num_rows else []
        for begin, end in [*plan.padding, *tail]:
            clear_rows(rows, me, begin, end, node.config.num_topk)
        self.arrived_L += plan.stored_LL[:, me]
        what = Waiting(self.op, constants["PHASE_ARRIVE"], self.epoch)
        for writer in np.flatnonzero(plan.stored_LL[:, me]).tolist():
            address = node.control.own.counter("arrived", writer)
            node.control.wait(address, int(self.arrived_L[writer]), writer, what)
        self.phases.mark("arrive")

    def _result(self, routes: Routes, handle: Handle, messages: int) -> DispatchResult:
        call, config, lease = self.call, self.node.config, self.lease
        rows = routes.rows_of(self.node.topology.rank)
        parts = self._parts(rows)
        scales: torch.Tensor | None = None
        if call.format == WireFormat.FP8:
            shape = (rows, self.record.scale_bytes // 4)
            scales = lease.tensor(parts.scales, shape, torch.float32)
        elif call.format == WireFormat.FP8_UE8M0:
            shape = (rows, self.record.scale_bytes // 4)
            scales = lease.tensor(parts.scales, shape, torch.int32)
        topk_idx = weights = None
        if not self.by_expert:
            topk_idx = lease.tensor(parts.topk, (rows, config.num_topk), torch.int64)
        if call.topk_weights is not None:
            shape_w = (rows,) if self.by_expert else (rows, config.num_topk)
            weights = lease.tensor(parts.weights, shape_w, torch.float32)
        labels = Labels(
            topk_idx,
            weights,
            lease.tensor(parts.source, (rows, 2), torch.int32),
            torch.from_numpy(routes.plan.tokens_per_expert.copy()),
        )
        x = lease.tensor(parts.x, (rows, config.hidden), _ROW_DTYPE[call.format])
        received = _Received(self, labels, routes, messages)
        return DispatchResult(Event(), received, x, scales, handle)


@dataclass
class _Received:
    """As epcomm.results.Received."""

    dispatch: Dispatch
    labels: Labels
    routes: Routes
    messages: int

    def time_phases(self) -> dict[str, float]:
        return self.dispatch.phases.seconds

    def count_traffic(self) -> Traffic:
        dispatch = self.dispatch
        return count_traffic(dispatch.node, dispatch.record, self.routes, self.messages)

    def make_labels(self) -> Labels:
        return self.labels

    def count_rows(self) -> int:
        return int(self.routes.plan.rows_R[self.dispatch.node.topology.rank])


def count_traffic(node: Node, record: RecordLayout, routes: Routes, messages: int) -> Traffic:
    """What this rank moved in a dispatch."""
    topology, layout = node.topology, routes.layout
    row_payload = record.payload_bytes + record.scale_bytes
    row_meta = 8 + (4 if routes.by_expert else 12 * node.config.num_topk)
    others = np.arange(topology.ranks_per_node) != topology.local_rank
    stored = int(routes.plan.stored_LL[topology.local_rank][others].sum())
    remote = np.arange(topology.num_nodes) != topology.node
    records = int(layout.node_tokens_N[remote].sum())
    announced = node.announcer.nbytes
    up_announced = announced * topology.num_nodes * (topology.ranks_per_node - 1)
    out_announced = announced * (topology.num_nodes - 1)
    return Traffic(
        scale_up=LinkTraffic(stored, stored * row_payload, stored * row_meta + up_announced),
        scale_out=LinkTraffic(
            messages + topology.num_nodes - 1,
            records * row_payload,
            records * (record.bytes - row_payload) + out_announced,
        ),
        records=records,
        alternatives=alternatives(node, layout, row_payload, stored),
    )


def alternatives(
    node: Node, layout: Layout, row_payload: int, scale_up_rows: int
) -> dict[str, LinkBytes]:
    """Payload bytes of other schemes for the tokens of ``layout``.

    ``scale_up_rows`` is what this protocol moved inside the node, forwarded rows included.
    """
    topology = node.topology
    bf16 = 2 * node.config.hidden
    ranks_R = layout.rank_rows_R.astype(np.int64)
    experts_R = layout.expert_rows_E.astype(np.int64).reshape(topology.num_ranks, -1).sum(axis=1)
    here_R = topology.node_of_R == topology.node
    other_R = here_R & (np.arange(topology.num_ranks) != topology.rank)
    remote_N = np.arange(topology.num_nodes) != topology.node

    def flat(rows_R: Any, row_bytes: int) -> LinkBytes:
        up, out = int(rows_R[other_R].sum()), int(rows_R[~here_R].sum())
        return LinkBytes(up * row_bytes, out * row_bytes)

    per_node = int(layout.node_tokens_N[remote_N].sum())
    return {
        "per_rank": flat(ranks_R, row_payload),
        "per_expert": flat(experts_R, row_payload),
        "per_rank_bf16": flat(ranks_R, bf16),
        "per_node_bf16": LinkBytes(scale_up_rows * bf16, per_node * bf16),
    }
