"""Signals inside a node: control blocks, waits with an end, and who is to blame.

Every rank owns a control segment: one ``epcomm_control``, then two sets (by the epoch's parity)
of N announcement slots. A slot is overwritten two calls later; by then every peer has announced
the call in between, which it does only after it has read the earlier slot.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from ..backend import Options
from ..errors import PeerTimeoutError
from ..native import Wait, align, constants, dtypes, library
from ..topology import Topology
from .scaleout import Request, ScaleOut
from .segments import Segment

_CONTROL = dtypes["control"]
_COUNTER = constants["sizeof_counter"]
_OFFSET = {name: _CONTROL.fields[name][1] for name in _CONTROL.names or ()}  # type: ignore[index]
_PHASES = {
    value: name.removeprefix("PHASE_").lower()
    for name, value in constants.items()
    if name.startswith("PHASE_")
}
_OPS = {
    value: name.removeprefix("OP_").lower().replace("_", " ")
    for name, value in constants.items()
    if name.startswith("OP_")
}
#: Python handles signals, such as Ctrl-C, between waits of this length.
_SLICE_NS = 200_000_000


@dataclass(frozen=True)
class Waiting:
    """What a wait belongs to: the words of its error message."""

    op: int
    phase: int
    epoch: int


class ControlBlock:
    """One rank's control segment, mapped here."""

    def __init__(self, segment: Segment, pid: int) -> None:
        self.segment = segment
        self.pid = pid
        self.identity = np.frombuffer(segment.map, _CONTROL, 1)[["rank", "pid", "abi_version"]]
        self.wait = self._part("wait")
        self.error = self._part("error")

    @staticmethod
    def nbytes(num_nodes: int, announcement_bytes: int) -> int:
        slots = 2 * num_nodes * announcement_bytes
        return align(constants["sizeof_control"], constants["limit_window_align"]) + slots

    def _part(self, name: str) -> np.ndarray:
        state = dtypes["wait_state"]
        return np.frombuffer(self.segment.map, state, 1, _OFFSET[name])

    def counter(self, name: str, index: int = 0) -> int:
        """Address of a counter."""
        return self.segment.address + _OFFSET[name] + index * _COUNTER

    def slots(self, parity: int, num_nodes: int, announcement_bytes: int) -> np.ndarray:
        """The announcement slots of one parity, uint8 [N, bytes]."""
        start = align(constants["sizeof_control"], constants["limit_window_align"])
        nbytes = num_nodes * announcement_bytes
        flat = self.segment.array(start + parity * nbytes, nbytes)
        return flat.reshape(num_nodes, announcement_bytes)


class NodeControl:
    """The control blocks of a node's ranks and the waits on them."""

    def __init__(
        self, topology: Topology, blocks: list[ControlBlock], scale_out: ScaleOut, options: Options
    ) -> None:
        self.topology = topology
        self.blocks = blocks
        self.own = blocks[topology.local_rank]
        self.timeout = options.timeout
        self._scale_out = scale_out
        # With a core for every rank of the host a short spin beats a system call; with fewer it
        # only takes the core from whoever is to signal.
        self._spin = 2000 if options.own_core else 0

    def signal(self, local_rank: int, name: str, index: int, amount: int = 1) -> None:
        """Add to a counter of a local rank, releasing what was stored before."""
        library.epcomm_counter_add(self.blocks[local_rank].counter(name, index), amount)

    def wait(self, address: int, expected: int, local_rank: int, what: Waiting) -> None:
        """Wait for a counter that ``local_rank`` will raise.

        Raises:
            PeerTimeoutError: it did not within the deadline, or its process is gone, or another
                rank gave up.
        """
        if library.epcomm_counter_read(address) >= expected:
            return  # the usual case after the first of several waits
        rank = self.topology.node_ranks[local_rank]
        self._publish(what, rank, expected, 0)
        watched = 0 if local_rank == self.topology.local_rank else self.blocks[local_rank].pid
        how = Wait(_SLICE_NS, watched, self._spin, self.own.counter("aborted"))
        deadline = time.monotonic() + self.timeout
        result = constants["WAIT_TIMEOUT"]
        while result == constants["WAIT_TIMEOUT"]:
            result = library.epcomm_counter_wait(address, expected, ctypes.byref(how))
            # A rank of another node may know what nobody here does yet.
            if result == constants["WAIT_TIMEOUT"] and self._heard_abort():
                result = constants["WAIT_ABORTED"]
            if time.monotonic() >= deadline:
                break
        if result != constants["WAIT_OK"]:
            self._publish(what, rank, expected, library.epcomm_counter_read(address))
            self._give_up(result, rank)
        self.own.wait["waiting"] = 0

    def wait_requests(
        self,
        requests: dict[int, Request],
        what: Waiting,
        on_done: Callable[[int], None] | None = None,
    ) -> None:
        """Wait for messages, by rail peer; ``on_done(rank)`` runs as each completes.

        Raises:
            PeerTimeoutError: as for :meth:`wait`.
            FabricError: this rank's fabric failed, through no peer.
        """
        pending = dict(requests)
        deadline = time.monotonic() + self.timeout
        idle = 0
        while pending:
            try:
                completed = []
                for suspect, request in pending.items():
                    if request.done():
                        completed.append(suspect)
            except ConnectionError as error:
                # A failure of what all requests share says itself whom it concerns; nobody else
                # is to blame for one that concerns this rank alone.
                named: tuple[int, ...] = getattr(error, "ranks", (suspect,))
                if not named:
                    raise
                self.lost(named[0], what)
            for rank in completed:
                del pending[rank]
                if on_done is not None:
                    on_done(rank)
            if completed:
                deadline, idle = time.monotonic() + self.timeout, 0
                continue
            idle += 1
            if idle < self._spin // 50:
                continue
            self._publish(what, next(iter(pending)), 1, 0)
            if library.epcomm_counter_read(self.own.counter("aborted")):
                self._give_up(constants["WAIT_ABORTED"], -1)
            if self._heard_abort():
                self._give_up(constants["WAIT_ABORTED"], -1)
            if time.monotonic() >= deadline:
                self._give_up(constants["WAIT_TIMEOUT"], next(iter(pending)))
            time.sleep(min(20e-6 * (idle - self._spin // 50), 1e-3))
        self.own.wait["waiting"] = 0

    def _heard_abort(self) -> bool:
        """Whether a rail peer gave up; keeps what it said."""
        message = np.zeros(1, dtypes["wait_state"])
        if not self._scale_out.poll_abort(message):
            return False
        self.own.error[:] = message
        return True

    def lost(self, rank: int, what: Waiting) -> NoReturn:
        """A rank's memory or connection is gone: raise PeerTimeoutError for whom that is due to."""
        self._publish(what, rank, 1, 0)
        aborted = library.epcomm_counter_read(self.own.counter("aborted")) != 0
        self._give_up(constants["WAIT_ABORTED" if aborted else "WAIT_PEER_GONE"], rank)

    def abort(self, what: Waiting) -> None:
        """This rank failed half-way through a call: end the waits of all who depend on it."""
        failed = Waiting(what.op, constants["PHASE_FAILED"], what.epoch)
        self._publish(failed, self.topology.rank, 0, 0)
        self._tell(self.own.wait.copy())

    def _tell(self, error: np.ndarray) -> None:
        for local, block in enumerate(self.blocks):
            if not library.epcomm_counter_read(block.counter("aborted")):
                block.error[:] = error
                self.signal(local, "aborted", 0)
        for peer in self.topology.rail:
            if peer != self.topology.rank:
                self._scale_out.send_abort(peer, error)

    def _publish(self, what: Waiting, rank: int, expected: int, seen: int) -> None:
        state = self.own.wait
        state["op"], state["phase"], state["epoch"] = what.op, what.phase, what.epoch
        state["rank"], state["expected"], state["seen"] = rank, expected, seen
        state["waiting"] = 1

    def _culprit(self, rank: int) -> np.ndarray:
        """Follow the waits from ``rank`` to one that waits for nobody here.

        A rank that is itself waiting is a victim; whom it waits for is the next suspect.
        """
        state = self.own.wait.copy()
        for _ in range(self.topology.num_ranks):
            if self.topology.node_of[rank] != self.topology.node or rank == self.topology.rank:
                break
            next_state = self.blocks[int(self.topology.local_of_R[rank])].wait.copy()
            if not next_state["waiting"][0] or next_state["epoch"][0] != state["epoch"][0]:
                break
            state, rank = next_state, int(next_state["rank"][0])
        return state

    def _give_up(self, result: int, rank: int) -> NoReturn:
        """Tell everyone who can be told, then raise."""
        gone = result == constants["WAIT_PEER_GONE"]
        if result == constants["WAIT_ABORTED"]:
            error = self.own.error.copy()
        else:
            error = self.own.wait.copy() if gone else self._culprit(rank)
        # Also what was learnt from others: it reached this rank by its node or by its rail, and
        # some rank may wait for this one on the other way.
        self._tell(error)
        raise PeerTimeoutError(*self._describe(error[0], gone, result))

    def _describe(self, error: np.void, gone: bool, result: int) -> tuple[str, tuple[int, ...]]:
        rank = int(error["rank"])
        call = f"{_OPS[int(error['op'])]} (call {int(error['epoch'])})"
        if error["phase"] == constants["PHASE_FAILED"]:
            return f"{call}: rank {rank} failed half-way; its own error says why", (rank,)
        why = f"no sign of it for {self.timeout:g} s"
        if gone:
            why = "its process is gone, or its buffer closed"
        elif result == constants["WAIT_ABORTED"]:
            why = "another rank gave up on it"
        return (
            f"{call}: rank {rank} is silent in phase "
            f"{_PHASES[int(error['phase'])]}: {why}; expected count "
            f"{int(error['expected'])}, seen {int(error['seen'])}",
            (rank,),
        )
