"""Where the time of a call goes."""

import time
from collections import deque

from ..trace_events import Span

#: Phases that a timeline keeps.
_CAPACITY = 1 << 14


class HostSpans:
    """The last phases of a rank's calls, for a timeline.

    Attributes:
        call: number of the call that is being made, the same on all ranks.
        count: phases added so far; older ones than are kept are lost.
    """

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self.call = 0
        self.count = 0
        self._kept: deque[Span] = deque(maxlen=capacity)

    def add(self, name: str, begin: float, end: float) -> None:
        """Add a phase, in seconds of time.perf_counter, which is the host's monotonic clock."""
        self._kept.append(Span(int(begin * 1e9), int(end * 1e9), name, self.call))
        self.count += 1

    def read(self) -> tuple[list[Span], int]:
        """The phases kept, oldest first, and how many were lost."""
        return list(self._kept), self.count - len(self._kept)

    def restart(self) -> None:
        """Forget all of them."""
        self._kept.clear()
        self.count = 0


class Phases:
    """Seconds by phase; a phase ends when it is marked.

    Args:
        operation: whose phases.
        spans: where they are also kept.
    """

    def __init__(self, operation: str, spans: HostSpans | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._operation, self._spans = operation, spans
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        """End the current phase and call it ``name``; marks of one name add up."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        if self._spans is not None:
            self._spans.add(f"{self._operation}: {name}", self._last, now)
        self._last = now
