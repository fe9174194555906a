"""Which dispatches need not wait for a verdict, because every rank has a window for them."""

from collections import deque
from typing import Any

from . import abi

_FREE_BITS: int = abi.constants.get("FREE_BITS", 0)
_MOST_FREE = (1 << _FREE_BITS) - 1


class Credit:
    """Counts the dispatches that every rank is known to have a window for.

    The kernels of a call report how many windows were left to the rank that had fewest when the
    call was announced. Each later dispatch takes one of them at most, whatever was given back
    since. So ranks may read reports of different calls, and be right all the same.

    Args:
        report: what the kernels report to, ``epcomm_cuda_report``.
    """

    def __init__(self, report: Any) -> None:
        self._report = report
        self._number = 0  # of the call whose windows are known
        self._free = 0
        self._later: deque[int] = deque()  # dispatches after that call

    def spend(self, number: int) -> bool:
        """A dispatch of this number is made; returns what ``covers`` does."""
        self._later.append(number)
        return self.covers(number)

    def covers(self, number: int) -> bool:
        """Whether an earlier call's report shows that all have a window for this last dispatch.

        Its own report does not: where a rank had none, the verdict says so.
        """
        report, later = self._report.free_windows, self._later
        judged = report >> _FREE_BITS
        # What a replayed graph reports is an old call's, and says nothing new.
        if judged > self._number:
            self._number, self._free = judged, report & _MOST_FREE
            while later and later[0] <= judged:
                later.popleft()
        return self._number < number and self._free >= len(later)

    def next_report(self, after: int, last: int) -> int:
        """The first dispatch after this one that no report has been read of, ``last`` at most."""
        return next((number for number in self._later if number > after), last)
