"""What carries chunks between the emulated ranks: proxies, or NICs that the kernels post to."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from epcomm.fabric.abi import dtypes

_RING_SLOTS = 256
_TIMEOUT_NS = 10**10
_STATE = dtypes["state"]


def aligned(nbytes: int) -> np.ndarray:
    """Zeroed bytes on a 128-byte boundary."""
    raw = np.zeros(nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 128
    return raw[start : start + nbytes]


class Member(ctypes.Structure):
    """``emulated_member``: a rank's place in the fabric."""

    _fields_ = [
        ("node", ctypes.c_int32),
        ("num_nodes", ctypes.c_int32),
        ("rail", ctypes.c_void_p),
        ("regions", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("num_regions", ctypes.c_int32),
        ("silent_after", ctypes.c_int32),
        ("state", ctypes.c_void_p),
        ("proxied", ctypes.c_void_p),
        ("late_ns", ctypes.c_int64),
    ]


class _Rule(ctypes.Structure):
    _fields_ = [
        ("fault", ctypes.c_char_p),
        ("rank", ctypes.c_int32),
        ("peer", ctypes.c_int32),
        ("channel", ctypes.c_int32),
        ("chance", ctypes.c_uint32),
        ("first", ctypes.c_int64),
        ("last", ctypes.c_int64),
        ("amount_ns", ctypes.c_uint64),
        ("exact", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


class _NicPlan(ctypes.Structure):
    _fields_ = [
        ("num_channels", ctypes.c_int32),
        ("num_planes", ctypes.c_int32),
        ("num_blocks", ctypes.c_uint32),
        ("retry_ns", ctypes.c_uint32),
        ("start", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("shuffle", ctypes.c_int32),
        ("num_rules", ctypes.c_int32),
        ("rules", ctypes.c_void_p),
        ("timeout_ns", ctypes.c_int64),
        ("failover", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


def declare(library: ctypes.CDLL) -> None:
    """Say what the library's functions for fabrics take."""
    pointer, i32 = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("make", pointer, [pointer, pointer, i32]),
        ("fabric", pointer, [pointer, i32]),
        ("kill", None, [pointer, i32]),
        ("finish", None, [pointer, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64]),
        ("faults", ctypes.c_uint64, [pointer]),
        ("free", None, [pointer]),
    ):
        function = getattr(library, f"emulated_nics_{name}")
        function.restype, function.argtypes = result, arguments


class Fabric(Protocol):
    """The fabric of one emulated world.

    Attributes:
        nics: what ``emulate`` takes for the NICs; None without.
        channels: of a rank.
    """

    nics: int | None
    channels: int

    def make(self, library: ctypes.CDLL, members: "ctypes.Array[Member]") -> None:
        """Connect the members, and fill in what the fabric needs of them."""

    def structs(self, rank: int) -> tuple[bytes, bytes | None]:
        """What a rank's kernels take: ``epcomm_fabric``, ``epcomm_ibgda``."""

    def finish(self) -> None:
        """After a run: nobody broke the fabric's rules."""


@dataclass
class Proxies:
    """A thread for each rank that delivers its triggers late and in any order that is allowed.

    Attributes:
        silent: ranks of which only so many operations arrive.
        late: seconds by which any operation is held back, at most.
    """

    silent: dict[int, int] = field(default_factory=dict)
    late: float = 0.0
    nics: int | None = None
    channels: int = 2
    _fabrics: list[np.ndarray] = field(default_factory=list)
    _keep: list[Any] = field(default_factory=list)

    def make(self, library: ctypes.CDLL, members: "ctypes.Array[Member]") -> None:
        for rank, member in enumerate(members):
            fabric = self._fabric_of(member)
            member.proxied = fabric.ctypes.data
            member.silent_after = self.silent.get(rank, -1)
            member.late_ns = int(self.late * 1e9)
            self._fabrics.append(fabric)

    def _fabric_of(self, member: Member) -> np.ndarray:
        ring, fabric = np.zeros((), dtypes["ring"]), np.zeros((), dtypes["fabric"])
        slots, producer = aligned(16 * _RING_SLOTS), aligned(128)
        ring["slots"], ring["producer"] = slots.ctypes.data, producer.ctypes.data
        ring["consumer"] = member.state + _STATE.fields["consumers"][1]  # type: ignore[index]
        ring["num_slots"] = _RING_SLOTS
        rings = fabric["rings"].view(np.uint8).reshape(-1)
        rings[: dtypes["ring"].itemsize] = np.frombuffer(ring.tobytes(), np.uint8)
        fabric["state"], fabric["timeout_ns"] = member.state, _TIMEOUT_NS
        fabric["num_rings"], fabric["num_channels"] = 1, self.channels
        fabric["num_nodes"], fabric["node"] = member.num_nodes, member.node
        self._keep += [slots, producer]
        return fabric

    def structs(self, rank: int) -> tuple[bytes, bytes | None]:
        return self._fabrics[rank].tobytes(), None

    def finish(self) -> None:
        pass


@dataclass(frozen=True)
class Rule:
    """A fault of the NICs, by the name that csrc/emulated/fault.h gives it.

    Attributes:
        rank, peer, channel: whose requests, to which node; -1: all.
        first, last: requests of a queue pair, from 0.
        chance: of 1.
        seconds: how late, at most; ``exact``: as it is.
    """

    fault: str
    rank: int = -1
    peer: int = -1
    channel: int = -1
    first: int = 0
    last: int = 1 << 40
    chance: float = 1.0
    seconds: float = 0.0
    exact: bool = False


#: What a right program does not notice.
HARMLESS = tuple(
    Rule(fault, chance=0.25, seconds=seconds)
    for fault, seconds in (
        ("delay", 3e-4),
        ("late fetch", 1e-4),
        ("lost doorbell", 3e-4),
        ("pieces", 2e-4),
        ("late completion", 3e-4),
    )
)


@dataclass
class Nics:
    """Emulated NICs, all of them served by one thread; the kernels post to them.

    Attributes:
        silent: as Proxies, in requests of the queue pairs of channel 0 (an operation has two);
            nothing of other channels arrives.
        planes: NICs of a rank.
        channels: of a rank.
        failover: lanes move off dead planes.
        blocks: of a send queue.
        start: where the queues' counters start.
        rules: faults.
        seed: of faults; ``shuffle``: also of the order in which queue pairs are served.
        retry: seconds until a peer that does not answer is an error.
        dead: a rank whose NICs answer nobody.
        timeout: seconds a producer waits for a free slot.
    """

    silent: dict[int, int] = field(default_factory=dict)
    planes: int = 1
    channels: int = 2
    failover: bool = False
    blocks: int = 64
    start: int = 0
    rules: Sequence[Rule] = ()
    seed: int = 0
    shuffle: bool = False
    retry: float = 0.05
    dead: int | None = None
    timeout: float = 10.0
    nics: int | None = None

    def make(self, library: ctypes.CDLL, members: "ctypes.Array[Member]") -> None:
        rules = [*self.rules]
        for rank, operations in self.silent.items():
            # For good: longer than any test lasts.
            for channel, first in enumerate([2 * operations] + [0] * (self.channels - 1)):
                rules.append(Rule("delay", rank, -1, channel, first, seconds=1e5, exact=True))
        table = (_Rule * len(rules))(
            *(
                _Rule(
                    *(r.fault.encode(), r.rank, r.peer, r.channel, int(r.chance * 65536)),
                    *(r.first, r.last, int(r.seconds * 1e9), int(r.exact)),
                )
                for r in rules
            )
        )
        plan = _NicPlan(
            *(self.channels, self.planes, self.blocks, int(self.retry * 1e9), self.start),
            *(self.seed, int(self.shuffle), len(rules), ctypes.addressof(table)),
            *(int(self.timeout * 1e9), int(self.failover)),
        )
        self._library = library
        self.nics = library.emulated_nics_make(
            ctypes.byref(plan), ctypes.addressof(members), len(members)
        )
        if self.dead is not None:
            library.emulated_nics_kill(self.nics, self.dead)

    def structs(self, rank: int) -> tuple[bytes, bytes | None]:
        address = self._library.emulated_nics_fabric(self.nics, rank)
        unused = bytes(dtypes["fabric"].itemsize)
        return unused, ctypes.string_at(address, dtypes["ibgda"].itemsize)

    def count_faults(self) -> int:
        """Faults that happened so far."""
        return self._library.emulated_nics_faults(self.nics)

    def finish(self) -> None:
        text = ctypes.create_string_buffer(4096)
        # What a silent rank sends is under way for good.
        limit = 0 if self.silent else 5 * 10**9
        self._library.emulated_nics_finish(self.nics, limit, text, len(text))
        assert not text.value, text.value.decode()

    def __del__(self) -> None:
        if self.nics is not None:
            self._library.emulated_nics_free(self.nics)
