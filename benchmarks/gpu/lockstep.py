"""Keeping ranks together when something fails: all go on, or the job ends."""

import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

#: A failing rank waits so long for the others, which a Buffer's deadline frees sooner than that.
_GRACE_SECONDS = 120.0
#: ... and after so long says why it does.
_TELL_SECONDS = 5.0


class Lockstep:
    """Runs steps that all ranks of a communicator take together.

    Args:
        comm: the ranks. Collective: it is duplicated, so that ranks which report a failure never
            meet the messages of those which still work.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm.Dup()

    def attempt(self, name: str, action: Callable[[], None]) -> bool:
        """Whether ``action`` ended well on every rank; says why where it did not.

        A rank that fails where the others wait in MPI for ever ends the job.
        """
        failure = details = ""
        try:
            action()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            details = traceback.format_exc()
        request = self._comm.Ibarrier()
        begin, told = time.monotonic(), False
        while not request.Test():
            waited = time.monotonic() - begin
            if failure and waited > _TELL_SECONDS and not told:
                words = f"rank {self._comm.rank}, {name}, others wait:\n{details}"
                print(words, file=sys.stderr, flush=True)
                told = True
            if failure and waited > _GRACE_SECONDS:
                self._comm.Abort(1)
            time.sleep(2e-4)
        failures = self._comm.allgather(failure)
        if not any(failures):
            return True
        if failures.index(next(filter(None, failures))) == self._comm.rank:
            print(details, file=sys.stderr, flush=True)
        if self._comm.rank == 0:
            reasons: dict[str, list[int]] = {}
            for rank, reason in enumerate(failures):
                if reason:
                    reasons.setdefault(reason, []).append(rank)
            for reason, ranks in reasons.items():
                print(f"  {name}: not measured; ranks {ranks}: {reason}", flush=True)
        return False
