"""Two short-lived ranks of a fabric, each a process of its own, joined by a pipe."""

import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from .guard import context, end_with_parent


class PairBootstrap:
    """What a Fabric needs of a bootstrap, between two processes."""

    size = 2

    def __init__(self, rank: int, pipe: Connection, seconds: float) -> None:
        self.rank = rank
        self._pipe = pipe
        self._deadline = time.monotonic() + seconds

    def allgather(self, item: Any) -> list[Any]:
        """Both ranks' items, by rank. Raises TimeoutError if the other says nothing."""
        self._pipe.send(item)
        if not self._pipe.poll(max(0.0, self._deadline - time.monotonic())):
            raise TimeoutError("the other process says nothing")
        theirs = self._pipe.recv()
        return [item, theirs] if self.rank == 0 else [theirs, item]

    def barrier(self) -> None:
        """Return once the other has come here too."""
        self.allgather(None)


Body = Callable[..., Any]


def _follow(body: Body, pipe: Connection, seconds: float, arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    body(PairBootstrap(1, pipe, seconds), *arguments)


def run_pair(seconds: float, body: Body, *arguments: Any) -> Any:
    """``body(bootstrap, *arguments)`` on both ranks; what rank 0's returned.

    Rank 0 is this process, which has made no thread and no CUDA context.

    Raises:
        Exception: what rank 0 raised; EOFError or TimeoutError where rank 1 is at fault.
    """
    mine, theirs = context.Pipe()
    other = context.Process(target=_follow, args=(body, theirs, seconds, arguments))
    other.start()
    theirs.close()
    try:
        return body(PairBootstrap(0, mine, seconds), *arguments)
    finally:
        other.join(2.0)
        other.kill()
