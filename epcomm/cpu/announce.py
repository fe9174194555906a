"""The round that opens every call: announcements reach every rank, and one verdict follows.

Nothing of the call's data moves before the verdict, so a refused argument or a disagreement
leaves every rank where it was, with an error that says what happened where.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..native import constants, dtypes
from ..topology import Topology
from ..verdict import find_error
from .control import NodeControl, Waiting
from .scaleout import Request, ScaleOut, Tag
from .segments import Segment

_HEADER = dtypes["announcement"]
# What must agree comes first in the structure, the status too: what follows may differ.
_AGREED_END = _HEADER.fields["num_tokens"][1]  # type: ignore[index]


@dataclass
class Counts:
    """Who sends how much: from the announcements of a first dispatch.

    Attributes:
        tokens_RN: records from each rank to each node, int32 [R, N].
        rank_rows_RR: distinct tokens from each rank to each rank, int32 [R, R].
        expert_rows_RE: tokens of each rank that chose each expert, int32 [R, E].
    """

    tokens_RN: np.ndarray
    rank_rows_RR: np.ndarray
    expert_rows_RE: np.ndarray


class Announcer:
    """Exchanges announcements: along the rail by message, inside the node by shared memory."""

    def __init__(
        self, topology: Topology, num_experts: int, control: NodeControl, scale_out: ScaleOut
    ) -> None:
        self._topology = topology
        self._control = control
        self._scale_out = scale_out
        self._num_experts = num_experts
        self.nbytes = announcement_bytes(topology, num_experts)

    def header(self, op: int, epoch: int) -> np.ndarray:
        """A fresh header, as a structured array of one element."""
        header = np.zeros(1, _HEADER)
        header["op"], header["epoch"], header["fixed_rows"] = op, epoch, -1
        return header

    def exchange(
        self, header: np.ndarray, counts: Sequence[np.ndarray] = ()
    ) -> tuple[np.ndarray, Counts]:
        """Announce this rank's part of a call and learn everybody's. Collective.

        Args:
            header: as made by :meth:`header`, filled in.
            counts: node_tokens [N], rank_rows [R], expert_rows [E], int32; none when cached.

        Returns:
            The headers by rank (structured [R]) and the counts.

        Raises:
            MismatchError: the ranks disagree; every rank raises it.
            PeerError: another rank refused its arguments.
            PeerTimeoutError: a rank is silent.
        """
        topology, control = self._topology, self._control
        epoch = int(header["epoch"][0])
        what = Waiting(int(header["op"][0]), constants["PHASE_ANNOUNCE"], epoch)
        mine = np.zeros((1, self.nbytes), np.uint8)
        mine[0, : _HEADER.itemsize] = header.view(np.uint8)
        if counts:
            body = np.concatenate(counts).astype(np.int32, copy=False).view(np.uint8)
            mine[0, _HEADER.itemsize :] = body
        slots_N = control.own.slots(epoch & 1, topology.num_nodes, self.nbytes)
        slots_N[topology.node] = mine[0]
        requests: dict[int, Request] = {}
        sends: dict[int, Request] = {}
        for node, peer in enumerate(topology.rail):
            if node != topology.node:
                into = slots_N[node : node + 1]
                requests[peer] = self._scale_out.receive(peer, Tag.ANNOUNCE, into)
                sends[peer] = self._scale_out.send(peer, Tag.ANNOUNCE, mine)
        control.wait_requests(requests, what)
        control.wait_requests(sends, what)
        control.signal(topology.local_rank, "announced", 0)

        gathered = np.empty((topology.num_ranks, self.nbytes), np.uint8)
        for local, block in enumerate(control.blocks):
            control.wait(block.counter("announced"), epoch, local, what)
            slots = block.slots(epoch & 1, topology.num_nodes, self.nbytes)
            gathered[topology.rank_of_NL[:, local]] = slots
        headers = gathered[:, : _HEADER.itemsize].copy().view(_HEADER)[:, 0]
        self._judge(headers)
        body = gathered[:, _HEADER.itemsize :].view(np.int32)
        splits = np.cumsum([topology.num_nodes, topology.num_ranks])
        return headers, Counts(*np.split(body, splits, axis=1))

    def _judge(self, headers: np.ndarray) -> None:
        if (self._agreed_bytes(headers) == self._agreed_bytes(headers[:1])).all() and not headers[
            "status"
        ].any():
            return
        error = find_error(headers, self._topology.rank)
        if error is not None:
            raise error

    @staticmethod
    def _agreed_bytes(headers: np.ndarray) -> np.ndarray:
        """The agreed fields of each header, uint8 [R, bytes]; the C header keeps them together."""
        flat = headers.view(np.uint8).reshape(len(headers), -1)
        return flat[:, :_AGREED_END]


def name_window(header: np.ndarray, segment: Segment, serial: int) -> None:
    """Say in a header where this rank's node peers find the call's window."""
    header["window_fd"], header["window_serial"] = segment.fd, serial
    header["window_bytes"] = segment.nbytes


def announcement_bytes(topology: Topology, num_experts: int) -> int:
    """Size of one announcement: header, then the counts."""
    return _HEADER.itemsize + 4 * (topology.num_nodes + topology.num_ranks + num_experts)
