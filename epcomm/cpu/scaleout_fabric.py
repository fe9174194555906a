"""Messages between nodes as puts over a fabric, into fixed places at the peer.

Every rank keeps, for each rail peer, one slot to send from and one to receive into:

    announcement of even calls | announcement of odd calls | abort | records

A message is one put and one signal, on a channel of its kind; the receiver counts signals. A place
is used again without asking, because the calls' own order says that its last message was read:

- An announcement overwrites that of two calls before. Its sender has finished the call between
  them, so it has that call's announcement of the receiver, who made it after reading the older.
- Records are sent after the verdict of their call, so after the receiver's announcement of it,
  which the receiver made after the call before had ended there.
- An abort is sent once.
"""

import weakref
from dataclasses import dataclass

import numpy as np

from ..backend import Options
from ..bootstrap import Bootstrap
from ..errors import FabricError
from ..fabric.abi import Place, constants
from ..fabric.fabric import Fabric, FabricOptions, RegionMemory
from ..native import align, dtypes, library
from ..topology import Topology
from .scaleout import Request, Tag
from .segments import Segment

_SIGNALS, _OUT, _IN = constants["SIGNALS"], 1, 2
_UNIT = constants["UNIT"]
_ALIGN = 128
#: Records of both directions share a channel: a call has only one of them.
_CHANNEL = {Tag.ANNOUNCE: 0, Tag.DATA: 1, Tag.RETURN: 1, Tag.ABORT: 2}
_CHANNELS = 3
_COUNTER_BYTES = 8


@dataclass(frozen=True)
class MessageSizes:
    """Most bytes of a message by kind."""

    announcement: int
    records: int


@dataclass(frozen=True)
class _Slot:
    """Byte offsets in the slot of a peer; ``nbytes`` is its size."""

    announcements: tuple[int, int]
    abort: int
    records: int
    nbytes: int

    @classmethod
    def lay_out(cls, sizes: MessageSizes) -> "_Slot":
        announcement = align(sizes.announcement, _ALIGN)
        abort = 2 * announcement
        records = abort + align(dtypes["wait_state"].itemsize, _ALIGN)
        return cls((0, announcement), abort, records, records + align(sizes.records, _ALIGN))


def region_bytes(num_nodes: int, sizes: MessageSizes) -> dict[int, int]:
    """Bytes of the fabric's regions, by number."""
    staging = num_nodes * _Slot.lay_out(sizes).nbytes
    signals = align(num_nodes * _CHANNELS * _COUNTER_BYTES, _ALIGN)
    return {_SIGNALS: signals, _OUT: staging, _IN: staging}


def fabric_options(topology: Topology, options: Options) -> FabricOptions:
    """How the fabric of a buffer runs."""
    transport, _, arguments = options.fabric.removeprefix("proxy/").partition(" ")
    if transport == "verbs":
        # First, so that the user's wins.
        arguments = f"local_rank={topology.local_rank} {arguments}"
    return FabricOptions(
        transport,
        arguments,
        num_channels=_CHANNELS,
        spin=200 if options.own_core else 0,
        timeout=options.timeout,
    )


class FabricScaleOut:
    """See epcomm.cpu.scaleout.ScaleOut. Made collectively.

    Raises:
        FabricError: the fabric cannot be made on this rank.
        PeerError: on another.
        OSError: no memory for the slots.
    """

    def __init__(
        self, bootstrap: Bootstrap, topology: Topology, sizes: MessageSizes, options: Options
    ) -> None:
        self._topology = topology
        self._slot = _Slot.lay_out(sizes)
        num_nodes = topology.num_nodes
        self._segments = {
            region: Segment.create(f"epcomm-fabric-{region}", nbytes)
            for region, nbytes in region_bytes(num_nodes, sizes).items()
        }
        regions = {
            number: RegionMemory(segment.address, segment.nbytes, segment, segment.fd)
            for number, segment in self._segments.items()
        }
        self._fabric = Fabric(bootstrap, topology, fabric_options(topology, options), regions)
        # How many messages of a (node, channel) were sent and are expected.
        self._sent_NC = np.zeros((num_nodes, _CHANNELS), np.int64)
        self._expected_NC = np.zeros((num_nodes, _CHANNELS), np.int64)
        self._aborts_N = np.zeros(num_nodes, np.int64)
        self._close = weakref.finalize(self, self._fabric.close)

    @property
    def fabric(self) -> Fabric:
        """What carries the messages."""
        return self._fabric

    # Memory -------------------------------------------------------------------------------

    def inbox(self, rank: int, nbytes: int) -> np.ndarray:
        return self._records(_IN, rank, nbytes)

    def outbox(self, rank: int, nbytes: int) -> np.ndarray:
        return self._records(_OUT, rank, nbytes)

    def _records(self, region: int, rank: int, nbytes: int) -> np.ndarray:
        node = self._topology.node_of[rank]
        assert self._slot.records + nbytes <= self._slot.nbytes
        return self._at(region, node * self._slot.nbytes + self._slot.records, nbytes)

    def _at(self, region: int, offset: int, nbytes: int) -> np.ndarray:
        return self._segments[region].array(offset, nbytes)

    def _place(self, tag: Tag, number: int) -> int:
        """Offset in a slot of a channel's message with this number, counted from 0."""
        if tag == Tag.ANNOUNCE:
            return self._slot.announcements[number & 1]
        return self._slot.abort if tag == Tag.ABORT else self._slot.records

    def _counter(self, node: int, channel: int) -> int:
        """Address of the counter of what came from a node on a channel."""
        index = node * _CHANNELS + channel
        return self._segments[_SIGNALS].address + index * _COUNTER_BYTES

    # Messages -----------------------------------------------------------------------------

    def send(self, rank: int, tag: Tag, data: np.ndarray) -> Request:
        node, channel = self._topology.node_of[rank], _CHANNEL[tag]
        place = self._place(tag, int(self._sent_NC[node, channel]))
        self._sent_NC[node, channel] += 1
        local = node * self._slot.nbytes + place
        staged = self._at(_OUT, local, data.nbytes)
        if staged.ctypes.data != data.ctypes.data:  # records were packed in place
            staged[:] = data.reshape(-1).view(np.uint8)
        me = self._topology.node
        ticket = self._fabric.put_signal(
            (node, channel),
            Place(_IN, me * self._slot.nbytes + place),
            Place(_OUT, local),
            align(data.nbytes, _UNIT),
            me * _CHANNELS + channel,
        )
        return _Sent(self._fabric, channel, ticket)

    def receive(self, rank: int, tag: Tag, into: np.ndarray) -> Request:
        node, channel = self._topology.node_of[rank], _CHANNEL[tag]
        place = self._place(tag, int(self._expected_NC[node, channel]))
        self._expected_NC[node, channel] += 1
        source = self._at(_IN, node * self._slot.nbytes + place, into.nbytes)
        expected = int(self._expected_NC[node, channel])
        return _Received(self._fabric, node, self._counter(node, channel), expected, source, into)

    def send_abort(self, rank: int, message: np.ndarray) -> None:
        node = self._topology.node_of[rank]
        told = self._sent_NC[node, _CHANNEL[Tag.ABORT]] != 0
        # A put to a process that is gone would fail the fabric, and the other peers' aborts.
        if not told and not self._fabric.peer_gone(node):
            self.send(rank, Tag.ABORT, message)

    def poll_abort(self, into: np.ndarray) -> bool:
        channel = _CHANNEL[Tag.ABORT]
        for rank in self._topology.rail:
            node = self._topology.node_of[rank]
            count = library.epcomm_counter_read(self._counter(node, channel))
            if count > self._aborts_N[node]:
                self._aborts_N[node] = count
                place = node * self._slot.nbytes + self._slot.abort
                into.view(np.uint8)[:] = self._at(_IN, place, into.nbytes)
                return True
        return False

    def close(self) -> None:
        self._close()


class _Sent:
    def __init__(self, fabric: Fabric, channel: int, ticket: int) -> None:
        self._fabric, self._channel, self._ticket = fabric, channel, ticket

    def done(self) -> bool:
        if self._ticket and self._fabric.done(self._channel, self._ticket):
            return True
        self._fabric.check()
        return False


class _Received:
    def __init__(
        self,
        fabric: Fabric,
        node: int,
        counter: int,
        expected: int,
        source: np.ndarray,
        into: np.ndarray,
    ) -> None:
        self._fabric, self._node = fabric, node
        self._counter, self._expected = counter, expected
        self._source, self._into = source, into

    def _arrived(self) -> bool:
        return library.epcomm_counter_read(self._counter) >= self._expected

    def done(self) -> bool:
        if not self._arrived():
            self._fabric.check()
            # It may have sent the message just before it ended.
            if self._fabric.peer_gone(self._node) and not self._arrived():
                rank = self._fabric.topology.rail[self._node]
                raise FabricError(f"the process of rank {rank} is gone", (rank,))
            return False
        if self._into.ctypes.data != self._source.ctypes.data:
            self._into.reshape(-1).view(np.uint8)[:] = self._source
        return True
