"""Communication beside computation: a matrix product on another stream at the same time."""

from dataclasses import dataclass
from typing import Any

import torch

from ..measure import align
from .cases import Call, calls
from .exchange import Exchange
from .figures import Table
from .timing import Effort, slowest, time_calls

# bfloat16 [2048, 7168] x [7168, 2048]: a tenth of a millisecond of a whole GPU of this kind.
_ROWS, _INNER, _COLUMNS = 2048, 7168, 2048


class _Gemm:
    """Matrix products on a stream of their own."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        with torch.cuda.stream(self.stream):
            self._a = torch.randn(_ROWS, _INNER, device="cuda", dtype=torch.bfloat16)
            self._b = torch.randn(_INNER, _COLUMNS, device="cuda", dtype=torch.bfloat16)
            self._c = torch.empty(_ROWS, _COLUMNS, device="cuda", dtype=torch.bfloat16)

    def launch(self, count: int) -> None:
        """Put products on the stream; returns at once."""
        with torch.cuda.stream(self.stream):
            for _ in range(count):
                torch.matmul(self._a, self._b, out=self._c)


@dataclass
class _Beside:
    """Seconds of a group."""

    calls: float
    products: float
    together: float


def _run(comm: Any, call: Call | None, effort: Effort, gemm: _Gemm, products: int) -> _Beside:
    """Medians over groups of calls and products started together; slowest rank; collective."""
    times = []
    current = torch.cuda.current_stream()
    for group in range(effort.groups + 1):
        torch.cuda.synchronize()
        align(comm)
        begin, called, multiplied = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        begin.record(current)
        gemm.stream.wait_event(begin)
        # First: launching them takes less time than a call, which may also wait for its peers.
        gemm.launch(products)
        multiplied.record(gemm.stream)
        if call is not None:
            for i in range(effort.calls):
                call(i)
        called.record(current)
        torch.cuda.synchronize()
        if group:
            both = (begin.elapsed_time(called) * 1e-3, begin.elapsed_time(multiplied) * 1e-3)
            times.append((*both, max(both)))
    medians = torch.tensor(times).median(dim=0).values.tolist()
    return _Beside(*slowest(comm, *medians))


def beside_gemm(exchange: Exchange, out: Table, effort: Effort) -> None:
    """Each cached call alone, as many products as take about as long alone, then both at once.

    All ranks multiply at the same time, as they communicate at the same time.
    """
    comm = exchange.comm
    gemm = _Gemm()
    gemm.launch(3)
    some = 8
    one = _run(comm, None, effort, gemm, some).products / some
    out.title("gemm", exchange)
    out.say(
        f"  beside [{_ROWS}, {_INNER}] x [{_INNER}, {_COLUMNS}] bfloat16 products of all ranks, "
        f"{one * 1e6:.1f} us each alone ({_flops() * exchange.shape.ranks / one / 1e12:.0f} "
        "TFLOP/s together)"
    )
    for name, size, call in calls(exchange, first=False):
        alone = time_calls(comm, call, effort)
        products = max(1, round(effort.calls * alone / one))
        products_alone = _run(comm, None, effort, gemm, products).products
        both = _run(comm, call, effort, gemm, products)
        beside = both.calls / effort.calls
        out.add("gemm", exchange, f"{name}, alone", alone, size)
        out.add(
            "gemm",
            exchange,
            f"{name}, beside products",
            beside,
            size,
            times_slower=beside / alone,
            products_times_slower=both.products / products_alone,
            both_us=both.together * 1e6,
            one_after_the_other_us=(alone * effort.calls + products_alone) * 1e6,
        )


def _flops() -> float:
    return 2.0 * _ROWS * _INNER * _COLUMNS
