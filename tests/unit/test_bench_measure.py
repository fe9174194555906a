"""Timing: what is interleaved, and which number stands for many."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks.measure import Timing, measure


class _Done:
    def Test(self) -> bool:
        return True


class _OneRank:
    """The communicator of a world of one."""

    rank = 0

    def Ibarrier(self) -> _Done:
        return _Done()

    def Barrier(self) -> None:
        pass

    def allgather(self, item: Any) -> list[Any]:
        return [item]


class _Recorder:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.phases: dict[str, float] = {}
        self._log = log
        self._calls = 0

    def prepare(self, step: str) -> None:
        self._log.append(f"prepare {step}")

    def _call(self) -> None:
        self._log.append(self.name)
        self._calls += 1
        self.phases = {"early": 1.0} if self._calls == 1 else {"early": 1.0, "late": 4.0}

    def steps(self) -> dict[str, Callable[[], object]]:
        return {"go": self._call}


def test_cases_take_turns_and_each_begins_once() -> None:
    log: list[str] = []
    cases = [_Recorder(name, log) for name in "abc"]
    timings = measure(_OneRank(), list(cases), repeats=3)
    assert [entry for entry in log if entry in "abc"] == list("abcbcacab")
    assert log[::2] == ["prepare go"] * 9
    assert [timing.case for timing in timings] == ["a", "b", "c"]
    assert all(timing.seconds_NR.shape == (3, 1) for timing in timings)


def test_a_phase_that_a_call_lacks_counts_as_nothing() -> None:
    timings = measure(_OneRank(), [_Recorder("a", [])], repeats=2)
    assert timings[0].phases == {"early": 1.0, "late": 2.0}


def test_the_slowest_rank_counts_in_each_repeat() -> None:
    timing = Timing("a", "go", np.array([[1.0, 5.0], [2.0, 3.0], [9.0, 4.0]]))
    assert timing.seconds_N.tolist() == [5.0, 3.0, 9.0]
    assert timing.seconds == pytest.approx(5.0)
    assert timing.seconds_R.tolist() == [2.0, 4.0]
