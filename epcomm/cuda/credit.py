"""Which dispatches need not wait for a verdict, because every rank has a window for them."""

from collections import deque
from typing import Any

from . import abi


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

    def spend(self, number: int) -> int:
        """The dispatch of this number has been launched.

        What a replayed graph reports is an old call's, and says nothing new.

        Returns:
            Windows left to the rank that has fewest; below 0: it may have had none for this call.
        """
        judged, free = divmod(self._report.free_windows, 1 << abi.constants["FREE_BITS"])
        later = self._later
        later.append(number)
        if judged > self._number:
            self._number, self._free = judged, free
            while later and later[0] <= judged:
                later.popleft()
        return self._free - len(later)
