"""Exchanges among all ranks of a group that end even if a rank does not take part.

A launcher's own collectives wait for ever. What follows is made of messages with a deadline.
"""

import pickle
import time
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from .cpu.scaleout import Request, ScaleOut, Tag
from .errors import PeerTimeoutError
from .native import constants, dtypes

#: Seconds in which whoever gave up waits for others who do; they hear of it within a round trip.
_ROLL_CALL = 1.0


def poll(done: Callable[[], bool], deadline: float) -> bool:
    """Ask ``done`` until it says yes, or until ``deadline`` (of time.monotonic) has passed."""
    pause = 0.0
    while not done():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause + 20e-6, 1e-3)
    return True


class Exchange:
    """All-gathers of small objects over a scale-out transport.

    A rank that gives up says so to all others. Whoever waits hears it, gives up as well and says so
    too; after that the ranks from which nobody has heard are the silent ones.
    """

    def __init__(self, rank: int, size: int, scale_out: ScaleOut, timeout: float) -> None:
        self._rank, self._size = rank, size
        self._scale_out = scale_out
        self._timeout = timeout
        self._gave_up: list[int] = []

    def allgather(self, item: Any) -> list[Any]:
        """Return every rank's ``item``, by rank. Collective.

        In ceil(log2 R) steps: before the step of distance d a rank has the items of the d ranks
        from itself on, and it gets those of the next d (Bruck et al., 1997).

        Raises:
            PeerTimeoutError: it took longer than the timeout, or another rank gave up.
        """
        deadline = time.monotonic() + self._timeout
        items = [item]
        distance = 1
        while distance < self._size:
            to = (self._rank - distance) % self._size
            source = (self._rank + distance) % self._size
            given = pickle.dumps(items[: self._size - distance])
            items += pickle.loads(self._swap(to, source, given, deadline))
            distance *= 2
        return [items[(r - self._rank) % self._size] for r in range(self._size)]

    def _swap(self, to: int, source: int, given: bytes, deadline: float) -> bytes:
        """Send to one rank and receive from another: first the length, then the bytes."""
        data = np.frombuffer(bytearray(given), np.uint8)[:, None]
        length = np.array([[data.size]], np.int64).view(np.uint8)
        sends = [self._scale_out.send(to, Tag.START, message) for message in (length, data)]
        due = np.zeros((1, 8), np.uint8)
        self._wait([self._scale_out.receive(source, Tag.START, due)], source, deadline)
        got = np.empty((int(due.view(np.int64)[0, 0]), 1), np.uint8)
        self._wait([self._scale_out.receive(source, Tag.START, got)], source, deadline)
        self._wait(sends, to, deadline)
        return got.tobytes()

    def _wait(self, requests: list[Request], suspect: int, deadline: float) -> None:
        def done() -> bool:
            return self._listen() or all(request.done() for request in requests)

        try:
            in_time = poll(done, deadline)
        except ConnectionError:
            self._give_up((suspect,), "the connection is closed")
        if self._gave_up or not in_time:
            self._call_roll(suspect)

    def _listen(self) -> bool:
        """Whether a rank gave up; remembers which."""
        message = np.zeros(1, dtypes["wait_state"])
        while self._scale_out.poll_abort(message):
            self._gave_up.append(int(message["rank"][0]))
        return bool(self._gave_up)

    def _call_roll(self, suspect: int) -> NoReturn:
        first = self._gave_up[:1]
        mine = np.zeros(1, dtypes["wait_state"])
        mine["rank"], mine["phase"] = self._rank, constants["PHASE_FAILED"]
        others = [r for r in range(self._size) if r != self._rank]
        for rank in others:
            self._scale_out.send_abort(rank, mine)

        def all_heard() -> bool:
            self._listen()
            return len(set(self._gave_up)) == len(others)

        poll(all_heard, time.monotonic() + _ROLL_CALL)
        why = f"rank {first[0]} gave up" if first else f"after {self._timeout:g} s"
        # Where nobody is heard, as over gloo, all that is known is whom this rank waited for.
        silent = [r for r in others if r not in self._gave_up] if self._gave_up else [suspect]
        if not silent:
            self._give_up(tuple(first), f"{why}; all ranks are here by now")
        self._give_up(tuple(silent), why)

    def _give_up(self, ranks: tuple[int, ...], why: str) -> NoReturn:
        names = ", ".join(map(str, ranks))
        raise PeerTimeoutError(f"making a Buffer: no sign of rank(s) {names} ({why})", ranks)
