"""Combine on the CPU: expose rows, announce, reduce for the rails, finish at home, release.

The sums are in ``reduce.py``; this file puts the steps in order.
"""

import numpy as np
import torch

from ..backend import CombineCall
from ..formats.wire import WireFormat
from ..native import RecordLayout, combine_record, constants
from ..results import CombineResult, Event
from ..traffic import LinkTraffic, Traffic
from .announce import name_window
from .control import Waiting
from .dispatch import Routes, alternatives
from .memory import STREAM_BYTES, copy_memory
from .node import Node
from .phases import Phases
from .reduce import Contributions, Home, Inputs, Wire, finish_tokens, reduce_records
from .scaleout import Request, Tag
from .segments import Lease
from .window import combine_parts


class Combine:
    """One combine under way."""

    def __init__(self, node: Node, call: CombineCall) -> None:
        """Do what can fail on this rank alone.

        Raises:
            OSError: no memory for a copy of the rows.
        """
        self.node = node
        self.call = call
        self.phases = Phases("combine", node.spans)
        self.routes: Routes = call.handle._state
        self.with_weights = call.topk_weights is not None
        config = node.config
        self.record: RecordLayout = combine_record(
            call.wire, config.hidden, config.num_topk, self.with_weights
        )
        self.header = node.announcer.header(constants["OP_COMBINE"], 0)
        self.lease = self._expose(self.header)  # keeps the window while peers read it
        self.phases.mark("expose")

    def run(self, epoch: int, combines: int) -> CombineResult:
        """Do the rest; see Buffer.combine for what is raised.

        ``combines`` counts the combines of this buffer, this one included.
        """
        self.epoch = epoch
        inputs = self._inputs(self._announce())
        out, out_weights = self._reduce(inputs)
        self._release(combines)
        back = None if out_weights is None else torch.from_numpy(out_weights)
        return CombineResult(Event(), self, out, back)

    # Asked by the result ------------------------------------------------------------------

    def time_phases(self) -> dict[str, float]:
        """As epcomm.results.Finished."""
        return self.phases.seconds

    def count_traffic(self) -> Traffic:
        """As epcomm.results.Finished."""
        row_bytes = self.call.x.element_size() * self.node.config.hidden
        return count_traffic(self.node, self.record, self.routes, self.messages, row_bytes)

    # Expose and announce ------------------------------------------------------------------

    def _expose(self, header: np.ndarray) -> Lease | None:
        """Make the rows readable by the node's other ranks: where they are, or in a window."""
        node, call = self.node, self.call
        if node.topology.ranks_per_node == 1:
            return None
        plain = call.weights is None and call.topk_weights is None
        found = node.windows.find(call.x)
        if found is not None and plain:
            name_window(header, found[0], found[1])
            header["rows_offset"] = found[2]
            return None
        parts = combine_parts(
            call.x.shape[0],
            call.x.element_size() * node.config.hidden,
            node.config.num_topk,
            self.routes.by_expert,
        )
        lease = node.windows.lease("combine")
        name_window(header, lease.segment, lease.serial)
        header["weights_offset"], header["topk_offset"] = parts.row_weights, parts.topk_weights
        # memcpy passes by the cache where a copy this long would only flush it.
        copy_memory(lease.segment.address + parts.x, call.x.data_ptr(), call.x.nbytes)
        if call.weights is not None:
            shape = tuple(call.weights.shape)
            lease.tensor(parts.row_weights, shape, torch.float32).copy_(call.weights)
        if call.topk_weights is not None:
            shape = tuple(call.topk_weights.shape)
            lease.tensor(parts.topk_weights, shape, torch.float32).copy_(call.topk_weights)
        return lease

    def _announce(self) -> np.ndarray:
        node, call, header = self.node, self.call, self.header
        header["epoch"] = self.epoch
        bf16 = call.x.dtype == torch.bfloat16
        header["format"] = WireFormat.BF16 if bf16 else WireFormat.F32
        header["layout"] = constants["LAYOUT_EXPERT" if self.routes.by_expert else "LAYOUT_RANK"]
        header["alignment"] = self.routes.alignment
        header["with_weights"] = self.with_weights
        header["row_weights"] = call.weights is not None
        header["wire"] = call.wire
        header["handle_epoch"] = self.routes.epoch
        header["num_tokens"] = self.call.handle.num_tokens
        headers, _ = node.announcer.exchange(header)
        self.phases.mark("announce")
        return headers

    def _inputs(self, headers: np.ndarray) -> Inputs:
        node = self.node
        what = Waiting(constants["OP_COMBINE"], constants["PHASE_DATA"], self.epoch)
        me = node.topology.local_rank
        others = np.ones(node.topology.ranks_per_node, bool)  # each waits for all others' release
        others[me] = False
        windows_L = node.window_addresses(headers, others, what)
        here = headers[node.topology.node_ranks]

        def at(part: str, mine: torch.Tensor | None, present: np.ndarray | bool) -> np.ndarray:
            """Addresses of a part; this rank's own is read from where the caller has it."""
            address_L = np.where(present, windows_L + here[part].astype(np.int64), 0)
            address_L[me] = 0 if mine is None else mine.data_ptr()
            return address_L

        call = self.call
        return Inputs(
            x_L=at("rows_offset", call.x, True),
            row_weights_L=at("weights_offset", call.weights, here["row_weights"] != 0),
            topk_weights_L=at("topk_offset", call.topk_weights, self.with_weights),
            local_of_E=node.local_of_E,
            format=int(here["format"][0]),
            hidden=node.config.hidden,
            by_expert=self.routes.by_expert,
        )

    # Reduce -------------------------------------------------------------------------------

    def _reduce(self, inputs: Inputs) -> tuple[torch.Tensor, np.ndarray | None]:
        node, routes, topology = self.node, self.routes, self.node.topology
        config = node.config
        what = Waiting(constants["OP_COMBINE"], constants["PHASE_RETURN"], self.epoch)
        wire = Wire(
            int(self.call.wire),
            self.record.weight if self.with_weights else -1,
            self.record.bytes,
            self._stream(),
        )
        receives, inbox_N = self._post_receives()
        sends = self._send_rails(inputs, wire)
        self.phases.mark("reduce for rails")
        num_tokens = self.call.handle.num_tokens
        out = self.call.out
        if out is None:
            # Memory of a window is warm from earlier calls; fresh pages cost more than the sum.
            shape = (num_tokens, config.hidden)
            out = node.windows.lease("result").tensor(0, shape, self.call.x.dtype)
        out_weights = np.zeros(
            (num_tokens if self.with_weights else 0, config.num_topk), np.float32
        )
        home = Home(
            inbox_N=inbox_N,
            slot_TN=routes.layout.slot_TN,
            node=topology.node,
            bias=np.array([b.data_ptr() for b in self.call.bias], np.int64),
            out=out.data_ptr(),
            out_weights_TK=out_weights,
        )
        far, near = routes.tokens_by_reach
        node.for_items(finish_tokens, near, routes.own, inputs, wire, home)
        self.phases.mark("reduce at home")
        node.control.wait_requests(receives, what)
        self.phases.mark("wait for records")
        node.for_items(finish_tokens, far, routes.own, inputs, wire, home)
        self.phases.mark("reduce at home")
        node.control.wait_requests(sends, what)
        self.phases.mark("wait for records")
        self.messages = len(sends)
        return out, out_weights if self.with_weights else None

    def _stream(self) -> bool:
        out = self.call.out
        aligned = out is None or out.data_ptr() % constants["limit_row_align"] == 0
        return aligned and self.call.handle.num_tokens * self.record.bytes > STREAM_BYTES

    def _post_receives(self) -> tuple[dict[int, Request], np.ndarray]:
        node, topology = self.node, self.node.topology
        inbox_N = np.zeros(topology.num_nodes, np.int64)
        receives: dict[int, Request] = {}
        for n, count in enumerate(self.routes.layout.node_tokens_N):
            if n != topology.node and count:
                peer = topology.rail[n]
                memory = node.scale_out.inbox(peer, int(count) * self.record.bytes)
                inbox_N[n] = memory.ctypes.data
                into = memory.reshape(int(count), self.record.bytes)
                receives[peer] = node.scale_out.receive(peer, Tag.RETURN, into)
        return receives, inbox_N

    def _send_rails(self, inputs: Inputs, wire: Wire) -> dict[int, Request]:
        """Reduce this node's rows of the rails' tokens and send them home, nearest node first."""
        node, topology = self.node, self.node.topology
        sends: dict[int, Request] = {}
        for step in range(1, topology.num_nodes):
            n = (topology.node + step) % topology.num_nodes
            contributions = self.routes.forwarded.get(n)
            if contributions is None:
                continue
            count = len(contributions.row_CK)
            peer = topology.rail[n]
            memory = node.scale_out.outbox(peer, count * self.record.bytes)
            items = np.arange(count, dtype=np.int32)
            node.for_items(reduce_records, items, contributions, inputs, wire, memory.ctypes.data)
            data = memory.reshape(count, self.record.bytes)
            sends[peer] = node.scale_out.send(peer, Tag.RETURN, data)
        return sends

    def _release(self, combines: int) -> None:
        """Tell the node's ranks that their rows were read; wait until this rank's were."""
        node, control = self.node, self.node.control
        for local in range(node.topology.ranks_per_node):
            control.signal(local, "released", node.topology.local_rank)
        what = Waiting(constants["OP_COMBINE"], constants["PHASE_RELEASE"], self.epoch)
        for local in range(node.topology.ranks_per_node):
            control.wait(control.own.counter("released", local), combines, local, what)
        self.phases.mark("release")


def count_traffic(
    node: Node, record: RecordLayout, routes: Routes, messages: int, row_bytes: int
) -> Traffic:
    """What this rank moved in a combine; rows of ``row_bytes``."""
    topology = node.topology
    weight_bytes = 0
    if record.bytes > record.weight:
        weight_bytes = 4 if routes.by_expert else 4 * node.config.num_topk
    read = sum(
        rows_read(c, node.local_of_E, topology.local_rank, routes.by_expert)
        for c in (routes.own, *routes.forwarded.values())
    )
    records = sum(len(c.row_CK) for c in routes.forwarded.values())
    payload = record.payload_bytes + record.scale_bytes
    announced = node.announcer.nbytes
    return Traffic(
        scale_up=LinkTraffic(
            read,
            read * row_bytes,
            read * weight_bytes + announced * topology.num_nodes * (topology.ranks_per_node - 1),
        ),
        scale_out=LinkTraffic(
            messages + topology.num_nodes - 1,
            records * payload,
            records * (record.bytes - payload) + announced * (topology.num_nodes - 1),
        ),
        records=records,
        alternatives=alternatives(node, routes.layout, row_bytes, read),
    )


def rows_read(c: Contributions, local_of_E: np.ndarray, me: int, by_expert: bool) -> int:
    """Rows of other ranks of the node that belong to the items of ``c``."""
    local_CK = np.where(c.row_CK >= 0, local_of_E[c.expert_CK], -1)
    if not by_expert:
        local_CK = np.sort(local_CK, axis=1)
        local_CK[:, 1:][local_CK[:, 1:] == local_CK[:, :-1]] = -1
    return int(((local_CK >= 0) & (local_CK != me)).sum())
