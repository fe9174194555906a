"""Where the time of a call goes."""

import time


class Phases:
    """Seconds by phase; a phase ends when it is marked."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        """End the current phase and call it ``name``; marks of one name add up."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
