"""Two threads of this process as the two ranks of a fabric, to try a transport with."""

import threading
from collections.abc import Callable
from typing import Any

from ..bootstrap import Bootstrap
from ..errors import FabricError


class Twin(Bootstrap):
    """One of the two, by ``rank``."""

    def __init__(
        self, rank: int, items: list[Any], barrier: threading.Barrier, patience: float
    ) -> None:
        self.rank, self.size = rank, 2
        self._items, self._meet, self._patience = items, barrier, patience

    def allgather(self, item: Any) -> list[Any]:
        """Both items, by rank. Raises BrokenBarrierError if the other fails or says nothing."""
        self._items[self.rank] = item
        self._meet.wait(self._patience)
        items = list(self._items)
        self._meet.wait(self._patience)
        return items

    def barrier(self) -> None:
        """Return once the other has come here too."""
        self.allgather(None)


def run_twins(patience: float, body: Callable[..., Any], *arguments: Any) -> Any:
    """``body(twin, *arguments)`` in two threads; what rank 0's returned.

    Args:
        patience: seconds that a twin waits for the other, and half of what both may take.
        body: see above.
        arguments: see above.

    Raises:
        Exception: what a twin raised; rather what it met itself than what it heard of the other.
        TimeoutError: they do not end.
    """
    items: list[Any] = [None, None]
    barrier = threading.Barrier(2)
    results: list[Any] = [None, None]
    problems: list[Exception] = []

    def one(rank: int) -> None:
        try:
            results[rank] = body(Twin(rank, items, barrier, patience), *arguments)
        except Exception as error:  # raised below
            problems.append(error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * patience)
    for error in sorted(problems, key=lambda problem: not isinstance(problem, FabricError)):
        raise error
    if any(thread.is_alive() for thread in threads):
        raise TimeoutError(f"not done after {2 * patience:g} s")
    return results[0]
