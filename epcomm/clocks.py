"""How the clocks of the ranks' hosts compare, for timelines."""

import time
from dataclasses import dataclass

from .bootstrap import Bootstrap, this_host

#: The best of so many exchanges counts.
_ROUNDS = 10


@dataclass(frozen=True)
class HostClock:
    """The monotonic clock of a rank's host.

    Attributes:
        domain: the same for ranks that have one clock.
        offset_ns: it minus that of rank 0's host.
        error_ns: what that may be wrong by, without drift.
    """

    domain: str
    offset_ns: int = 0
    error_ns: int = 0


def compare_hosts(bootstrap: Bootstrap) -> HostClock:
    """Compare this host's clock with that of rank 0's host. Collective.

    Nobody leaves an all-gather before everybody has entered it. So what this rank read on entering
    is not later than rank 0's leaving, and what rank 0 read on entering not later than this rank's
    leaving: two bounds of the difference from each round.
    """
    hosts = bootstrap.hosts()
    domain = " ".join(str(part) for part in ("host", this_host()))
    lowest: int | None = None
    highest: int | None = None
    entered = left = 0
    for number in range(_ROUNDS + 1):
        before = time.monotonic_ns()
        first_entered, first_left = bootstrap.allgather((before, left))[0]
        after = time.monotonic_ns()
        if number > 0:  # when rank 0 left the round before
            bound = entered - first_left
            lowest = bound if lowest is None else max(lowest, bound)
        bound = after - first_entered
        highest = bound if highest is None else min(highest, bound)
        entered, left = before, after
    assert lowest is not None
    assert highest is not None
    if hosts[bootstrap.rank] == hosts[0]:
        return HostClock(domain)
    return HostClock(domain, (lowest + highest) // 2, (highest - lowest + 1) // 2)
