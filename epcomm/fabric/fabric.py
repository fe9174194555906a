"""One rank's end of a fabric: registration, exchange of endpoints, operations, errors, teardown."""

import ctypes
import mmap
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bootstrap import Bootstrap, raise_together
from ..errors import BufferClosedError, FabricError
from ..native import library
from ..topology import Topology
from .abi import Place, constants, dtypes

#: Seconds without a sign of life after which a proxy thread counts as dead. Long enough for a
#: machine with many more ranks than cores.
STALL_SECONDS = 10.0
#: Seconds that closing waits for what is under way.
_DRAIN_SECONDS = 1.0
#: Memory that a proxy thread which did not come back may still use.
_abandoned: list[Any] = []


@dataclass(frozen=True)
class FabricOptions:
    """How a fabric runs. ``transport`` and ``num_channels`` are the same on all ranks.

    Attributes:
        transport: what carries operations, such as "local".
        arguments: the transport's own, "name=value" separated by spaces.
        num_channels: lanes with an order of their own, 1 to 64.
        num_rings: trigger rings, 1 to 8; channel c goes through ring c % num_rings.
        num_threads: proxy threads, 1 to num_rings.
        num_slots: triggers a ring holds, a power of two.
        max_in_flight: operations a thread may have under way.
        spin: empty rounds of a thread before it naps; 0 where ranks outnumber cores.
        device_fills: kernels fill the rings.
        longest_nap: seconds; where kernels fill the rings also what a nap adds to a latency.
        timeout: seconds a producer waits for a free slot.
        max_messages: that ``keep_messages`` may ask for, and events, where emulated NICs are on a
            GPU, 0 to 2**24; NICs of the host's threads need not be told before. The same on all
            ranks.
    """

    transport: str
    arguments: str = ""
    num_channels: int = 1
    num_rings: int = 1
    num_threads: int = 1
    num_slots: int = 512
    max_in_flight: int = 256
    spin: int = 0
    device_fills: bool = False
    longest_nap: float = 0.02
    timeout: float = 60.0
    max_messages: int = 0


@dataclass(frozen=True)
class RegionMemory:
    """Memory to register; ``keep`` holds whatever owns it.

    Attributes:
        fd: host memory: the memfd it maps, from byte ``fd_offset``.
        device: the CUDA device it is on; -1 for host memory.
    """

    address: int
    nbytes: int
    keep: Any
    fd: int = -1
    fd_offset: int = 0
    device: int = -1


@dataclass(frozen=True)
class RingMemory:
    """Zeroed memory for triggers and state (host, pinned for kernels) and for producers' heads.

    ``keep`` holds whatever owns it.
    """

    host: int
    producers: int
    keep: Any

    @staticmethod
    def sizes(options: FabricOptions) -> tuple[int, int]:
        """Bytes of ``host`` and ``producers``."""
        return (
            library.epcomm_fabric_host_bytes(options.num_slots, options.num_rings),
            library.epcomm_fabric_producer_bytes(options.num_rings),
        )

    @classmethod
    def of_host(cls, options: FabricOptions) -> "RingMemory":
        """Plain memory of this process, for host producers."""
        maps = [mmap.mmap(-1, nbytes) for nbytes in cls.sizes(options)]
        host, producers = (ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in maps)
        return cls(host, producers, maps)


def _stop(end: int, keep: tuple[Any, ...]) -> None:
    if library.epcomm_fabric_stop(end, int(_DRAIN_SECONDS * 1e9)) != 0:
        _abandoned.append(keep)
        return
    library.epcomm_fabric_destroy(end)


class Fabric:
    """A rank's fabric. Peers are named by node number. Made collectively.

    Args:
        bootstrap: for the exchange of addresses.
        topology: who sits where; peers are the other ranks of the rail.
        options: see FabricOptions.
        regions: memory by region id, 0 to 7; ids mean the same on every rank. Region 0 holds the
            signals, uint64 counters.
        memory: of the rings; None: plain host memory.

    Raises:
        FabricError: this rank could not register memory, make endpoints or connect.
        PeerError: another rank could not.
    """

    def __init__(
        self,
        bootstrap: Bootstrap,
        topology: Topology,
        options: FabricOptions,
        regions: dict[int, RegionMemory],
        memory: RingMemory | None = None,
    ) -> None:
        self.topology = topology
        self.options = options
        self._memory = memory or RingMemory.of_host(options)
        self._finish: Any = None
        self._open_end: int | None = None
        self._warned = 0
        self._kept = 0
        addresses: list[bytes] = []
        error: Exception | None = None
        try:
            self._create(regions)
            addresses = [self._address_for(n) for n in range(topology.num_nodes)]
        except FabricError as caught:
            error = caught
        raise_together(bootstrap, error)
        offered = bootstrap.allgather(addresses)
        try:
            self._connect([offered[rank][topology.node] for rank in topology.rail])
        except FabricError as caught:
            error = caught
        raise_together(bootstrap, error)

    def _create(self, regions: dict[int, RegionMemory]) -> None:
        options, topology = self.options, self.topology
        config = np.zeros((), dtypes["config"])
        config["node"], config["num_nodes"] = topology.node, topology.num_nodes
        for name in (
            *("num_channels", "num_rings", "num_threads", "num_slots", "max_in_flight"),
            "max_messages",
        ):
            config[name] = getattr(options, name)
        config["spin"], config["device_fills"] = options.spin, options.device_fills
        config["longest_nap_ns"] = int(options.longest_nap * 1e9)
        config["timeout_ns"] = int(options.timeout * 1e9)
        config["host_memory"] = self._memory.host
        config["producer_memory"] = self._memory.producers
        self._open_end = library.epcomm_fabric_create(
            config.ctypes.data, options.transport.encode(), options.arguments.encode()
        )
        if not self._open_end:
            raise FabricError(library.epcomm_fabric_text(None).decode())
        # Also when the interpreter ends: no thread may outlive the memory it uses.
        self._finish = weakref.finalize(self, _stop, self._end, (self._memory, regions))
        for number, memory in regions.items():
            region = np.zeros((), dtypes["region"])
            region["id"], region["device"] = number, memory.device
            region["fd"], region["fd_offset"] = memory.fd, memory.fd_offset
            region["pointer"], region["bytes"] = memory.address, memory.nbytes
            self._require(library.epcomm_fabric_add_region(self._end, region.ctypes.data))
        self._require(library.epcomm_fabric_open(self._end))

    @property
    def _end(self) -> int:
        if not self._open_end:
            raise BufferClosedError("the fabric is closed")
        return self._open_end

    @property
    def pointer(self) -> int:
        """Address of the ``epcomm_fabric`` that host producers pass."""
        return library.epcomm_fabric_of(self._end)

    def _require(self, result: int) -> None:
        if result < 0:
            raise FabricError(library.epcomm_fabric_text(self._end).decode())

    def _address_for(self, peer: int) -> bytes:
        if peer == self.topology.node:
            return b""
        size = library.epcomm_fabric_address(self._end, peer, None, 0)
        self._require(size)
        into = ctypes.create_string_buffer(size)
        self._require(library.epcomm_fabric_address(self._end, peer, into, size))
        return into.raw

    def _connect(self, addresses: list[bytes]) -> None:
        count = len(addresses)
        pointers = (ctypes.c_char_p * count)(*addresses)
        sizes = (ctypes.c_int64 * count)(*map(len, addresses))
        self._require(library.epcomm_fabric_connect(self._end, pointers, sizes))

    # Operations ---------------------------------------------------------------------------
    #
    # Host producers. Each returns a ticket for `done`, 0 when the fabric has failed.

    def put(self, lane: tuple[int, int], remote: Place, local: Place, nbytes: int) -> int:
        """Copy ``nbytes`` from ``local`` to ``remote`` at lane (peer, channel)."""
        return library.epcomm_fabric_put(
            self.pointer, *lane, ctypes.byref(remote), ctypes.byref(local), nbytes
        )

    def put_signal(
        self, lane: tuple[int, int], remote: Place, local: Place, nbytes: int, signal: int
    ) -> int:
        """``put``, then the peer's counter ``signal`` grows by 1."""
        return library.epcomm_fabric_put_signal(
            self.pointer, *lane, ctypes.byref(remote), ctypes.byref(local), nbytes, signal
        )

    def signal_add(self, lane: tuple[int, int], signal: int, value: int) -> int:
        """The peer's counter ``signal`` grows by ``value`` after all earlier bytes of the lane."""
        return library.epcomm_fabric_signal_add(self.pointer, *lane, signal, value)

    def noop(self, channel: int) -> int:
        """Through the ring and the proxy, and no further."""
        return library.epcomm_fabric_noop(self.pointer, channel)

    def done(self, channel: int, ticket: int) -> bool:
        """Whether that operation and all before it in its ring have completed at their peers."""
        return bool(library.epcomm_fabric_done(self.pointer, channel, ticket))

    def flush(self, channel: int, timeout: float) -> None:
        """Wait until all earlier operations of the channel have completed at their peers.

        Raises:
            FabricError: the fabric failed, or they have not within ``timeout`` seconds.
        """
        if not library.epcomm_fabric_flush(self.pointer, channel, int(timeout * 1e9)):
            self.check()
            raise FabricError(f"channel {channel} is not quiet after {timeout:g} s")

    # State --------------------------------------------------------------------------------

    @property
    def struct(self) -> bytes:
        """The ``epcomm_fabric`` that kernels take by value."""
        return ctypes.string_at(self.pointer, dtypes["fabric"].itemsize)

    @property
    def ibgda(self) -> bytes | None:
        """The ``epcomm_ibgda`` that kernels take by value; None where proxy threads post."""
        address = library.epcomm_fabric_ibgda_of(self._end)
        return ctypes.string_at(address, dtypes["ibgda"].itemsize) if address else None

    @property
    def has_atomics(self) -> bool:
        """Whether peers' kernels may let this rank's network cards add to its words."""
        return bool(library.epcomm_fabric_has_atomics(self._end))

    @property
    def threads(self) -> np.ndarray:
        """What the proxy threads did, a copy: ``proxy_thread`` [num_threads]."""
        size = dtypes["proxy_thread"].itemsize * self.options.num_threads
        start = self._memory.host + dtypes["state"].fields["threads"][1]  # type: ignore[index]
        return np.frombuffer(ctypes.string_at(start, size), dtypes["proxy_thread"])

    def count(self, *, restart: bool = False) -> np.ndarray | None:
        """What this rank's NICs sent since the last restart, a copy: ``traffic``, 0-d.

        None where no network is modelled. Only while no operation is under way.
        """
        traffic = np.zeros((), dtypes["traffic"])
        counted = library.epcomm_fabric_count(self._end, traffic.ctypes.data, restart) == 0
        return traffic if counted else None

    def keep_messages(self, capacity: int) -> bool:
        """Keep the last ``capacity`` messages of a modelled network from now on, and no older ones.

        And as many events. False where the transport models no network, does not tell, or has no
        room for so many.
        """
        result = library.epcomm_fabric_keep_messages(self._end, capacity)
        self._require(result)
        self._kept = capacity if result == 0 else 0
        return bool(result == 0)

    def messages(self) -> tuple[np.ndarray, int]:
        """The kept messages, oldest first: ``message`` [n]; and the number of all."""
        return self._notes("message", library.epcomm_fabric_messages)

    def events(self) -> tuple[np.ndarray, int]:
        """What emulated network cards did on purpose, or found, since ``keep_messages``.

        Injected faults, rules that whoever writes the requests broke, queue pairs that failed.

        Returns:
            The last ones, oldest first: ``event`` [n], ``time_ns`` by the clock of messages,
            ``describe_event`` says what they were; and the number of all.

        Raises:
            FabricError: network cards on the GPU do not answer.
        """
        return self._notes("event", library.epcomm_fabric_events)

    def _notes(self, name: str, read: Any) -> tuple[np.ndarray, int]:
        notes, total = np.zeros(self._kept, dtypes[name]), ctypes.c_uint64()
        count = read(self._end, notes.ctypes.data, len(notes), ctypes.byref(total))
        self._require(count)
        return notes[:count], total.value

    def describe(self) -> str:
        """One line: what the transport chose."""
        return library.epcomm_fabric_describe(self._end).decode()

    @property
    def lost_planes(self) -> tuple[str, ...]:
        """The planes that lanes were moved off: a line for each, with peer and reason."""
        lines, peer = [], ctypes.c_int32()
        for index in range(library.epcomm_fabric_num_losses(self._end)):
            text = library.epcomm_fabric_loss_text(self._end, index, ctypes.byref(peer))
            if text is None:
                lines.append("more planes are dead")
                break
            node = peer.value
            lines.append(f"to rank {self.topology.rail[node]}, node {node}: {text.decode()}")
        return tuple(lines)

    def _warn_of_lost_planes(self) -> None:
        lost = library.epcomm_fabric_num_losses(self._end)
        if lost == self._warned:
            return
        for line in self.lost_planes[self._warned :]:
            warnings.warn(f"fabric: {line}; other planes take over", RuntimeWarning, stacklevel=3)
        self._warned = lost

    def peer_gone(self, node: int) -> bool:
        """Whether the peer's process is known to be gone."""
        return bool(library.epcomm_fabric_peer_gone(self._end, node))

    def check(self, stall: float = STALL_SECONDS) -> None:
        """Raise FabricError if the fabric has failed.

        Notices dead proxy threads, and what an emulated network card has found: a rule of the
        card's interface that whoever writes its requests broke, also where no operation failed yet.
        Warns (RuntimeWarning) once for every plane to a peer that is not used any more.
        """
        failed = library.epcomm_fabric_check(self._end, int(stall * 1e9))
        self._warn_of_lost_planes()
        if not failed:
            return
        start = self._memory.host + dtypes["state"].fields["error"][1]  # type: ignore[index]
        raw = ctypes.string_at(start, dtypes["error"].itemsize)
        error = np.frombuffer(raw, dtypes["error"])[0]
        raise describe_error(error, self.topology)

    def close(self) -> None:
        """Carry out what is under way, briefly; end the threads and every wait. Local."""
        self._open_end = None
        if self._finish is not None:
            self._finish()


_STATUS = {
    constants["TRANSPORT"]: "the transport failed",
    constants["BAD_TRIGGER"]: "a trigger cannot be carried out",
    constants["RING_FULL"]: "no slot of a ring became free in time",
    constants["STALLED"]: "a proxy thread failed",
    constants["STOPPED"]: "closed",
}
_OPS = {constants[name]: name.lower() for name in ("NOOP", "PUT", "PUT_SIGNAL", "SIGNAL_ADD")}


def describe_error(error: np.void, topology: Topology) -> FabricError:
    """An error record in words."""
    status, peer = int(error["status"]), int(error["peer"])
    text = f"fabric: {_STATUS.get(status, f'status {status}')}"
    if error["text"]:
        text += f": {error['text'].decode(errors='replace')}"
    ranks: tuple[int, ...] = ()
    if 0 <= peer < topology.num_nodes and peer != topology.node:
        ranks = (topology.rail[peer],)
        # Nothing goes to a peer with NOOP: what was found without an operation has none.
        op, nbytes = int(error["op"]), int(error["bytes"])
        what = f"{_OPS[op]} of {nbytes} bytes " if op != constants["NOOP"] else ""
        text += (
            f" ({what}to rank {ranks[0]}, "
            f"node {peer}, channel {int(error['channel'])}, queue pair "
            f"{int(error['queue_pair'])}, vendor code {int(error['vendor'])})"
        )
    return FabricError(text, ranks, status, int(error["vendor"]))
