"""Timing over ranks: interleaved, aligned at the start, slowest rank counts."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Case(Protocol):
    """Something to time.

    Attributes:
        name: for the tables.
        phases: seconds by phase of the last call, or empty.

    """

    name: str
    phases: dict[str, float]

    def steps(self) -> dict[str, Callable[[], object]]:
        """Name the calls to time, in the order in which they must follow each other."""

    def prepare(self, step: str) -> None:
        """Do what must precede a step but is not timed."""


@dataclass
class Timing:
    """One step of one case.

    Attributes:
        case: the case's name.
        step: the step's name.
        seconds_NR: time of each repeat on each rank.
        phases: mean over ranks and repeats of the seconds of each phase.

    """

    case: str
    step: str
    seconds_NR: NDArray[np.float64]
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def seconds_N(self) -> NDArray[np.float64]:
        """Time of each repeat: that of its slowest rank."""
        return self.seconds_NR.max(axis=1)

    @property
    def seconds(self) -> float:
        """Median over the repeats."""
        return float(np.median(self.seconds_N))

    @property
    def seconds_R(self) -> NDArray[np.float64]:
        """Median over the repeats, of each rank by itself."""
        return np.median(self.seconds_NR, axis=0)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "case": self.case,
            "step": self.step,
            "seconds": self.seconds,
            "seconds_of_repeats": self.seconds_N.tolist(),
            "seconds_of_ranks": self.seconds_R.tolist(),
            "phases": self.phases,
        }


def wait_for_all(comm: Any) -> None:
    """Wait for every rank, asleep: who spins takes time from ranks that still work."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(2e-4)


def align(comm: Any) -> None:
    """Bring the ranks to the same point of time."""
    wait_for_all(comm)
    comm.Barrier()  # short, since all have come: it starts them closer together


def measure(comm: Any, cases: list[Case], repeats: int) -> list[Timing]:
    """Time every step of every case ``repeats`` times; collective, the result is on all ranks.

    Each repeat runs all cases, beginning with another one each time, so that a disturbance or a
    drift of the machine meets all of them.
    """
    own: dict[tuple[str, str], list[float]] = {}
    phases: dict[tuple[str, str], list[dict[str, float]]] = {}
    for repeat in range(repeats):
        start = repeat % len(cases)
        for case in cases[start:] + cases[:start]:
            for step, call in case.steps().items():
                case.prepare(step)
                align(comm)
                begin = time.perf_counter()
                call()
                own.setdefault((case.name, step), []).append(time.perf_counter() - begin)
                phases.setdefault((case.name, step), []).append(dict(case.phases))
    return [
        Timing(
            case=case.name,
            step=step,
            seconds_NR=np.array(comm.allgather(own[case.name, step])).T,
            phases=_mean(comm, phases[case.name, step]),
        )
        for case in cases
        for step in case.steps()
    ]


def _mean(comm: Any, phases: list[dict[str, float]]) -> dict[str, float]:
    """Average over repeats and ranks; a phase that a repeat or rank lacks counts as 0."""
    gathered = [repeat for rank in comm.allgather(phases) for repeat in rank]
    names = dict.fromkeys(name for repeat in gathered for name in repeat)
    return {n: sum(repeat.get(n, 0.0) for repeat in gathered) / len(gathered) for n in names}
