"""Time on the GPU, on the host, and as a caller sees it. The slowest rank counts."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..measure import align

_COPY_BYTES = 2 << 30
#: Calls timed on the host one after the other: few, so that no launch waits for the queue.
_HOST_CALLS = 4


@dataclass(frozen=True)
class Effort:
    """How much is measured: groups of calls, calls of a group."""

    groups: int
    calls: int


def copy_rate() -> float:
    """Bytes a second read and written by copies within this GPU."""
    rate = 2 * _COPY_BYTES / _copy_seconds()
    torch.cuda.empty_cache()
    return rate


def _copy_seconds() -> float:
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return float(np.median([gpu_seconds(lambda: target.copy_(source)) for _ in range(8)][2:]))


def gpu_seconds(action: Callable[[], object], stream: torch.cuda.Stream | None = None) -> float:
    """Seconds between events before and after what ``action`` puts on the stream; waits."""
    stream = stream or torch.cuda.current_stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(stream)
    action()
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def slowest(comm: Any, *values: float) -> list[float]:
    """Each value's largest over the ranks."""
    return np.max(comm.allgather(values), axis=0).tolist()


def time_calls(comm: Any, call: Callable[[int], object], effort: Effort) -> float:
    """Seconds a call takes the GPU, as one of several in a row; collective.

    Of the slowest rank, its median over groups. The call before a group fills the pipeline.
    """
    times = []
    for group in range(effort.groups + 1):
        torch.cuda.synchronize()
        align(comm)
        call(0)

        def calls() -> None:
            for i in range(effort.calls):
                call(i)

        seconds = gpu_seconds(calls) / effort.calls
        if group:  # the first warms up
            times.append(seconds)
    return slowest(comm, float(np.median(times)))[0]


def host_time(comm: Any, call: Callable[[int], object], effort: Effort) -> float:
    """Seconds of host time until a call returns, with a GPU that is idle at first; collective.

    Of the slowest rank, its median over single calls.
    """
    times = []
    for group in range(effort.groups + 1):
        torch.cuda.synchronize()
        align(comm)
        for i in range(_HOST_CALLS):
            start = time.perf_counter()
            call(i)
            if group:
                times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return slowest(comm, float(np.median(times)))[0]


def caller_time(comm: Any, call: Callable[[int], object], effort: Effort) -> float:
    """Seconds from a single call on an idle GPU until its tensors can be used; collective.

    By the host's clock: with the launches before and the wait behind. The median over calls, each
    of its slowest rank.
    """
    times = []
    for i in range(effort.groups * 2 + 2):
        torch.cuda.synchronize()
        align(comm)
        start = time.perf_counter()
        kept = call(i)
        torch.cuda.current_stream().synchronize()
        times.append(time.perf_counter() - start)
        del kept
    return float(np.median(np.max(comm.allgather(times[2:]), axis=0)))
