"""Dispatch and combine captured in a CUDA graph and replayed, beside the same calls one by one."""

from dataclasses import dataclass

import torch

from epcomm.results import CombineResult, DispatchResult, Handle

from .check import check_sums
from .exchange import Exchange
from .figures import Table, least_bytes
from .timing import Effort, host_time, time_calls


@dataclass
class _Calls:
    """A dispatch with a fixed number of rows, and the combine of what it delivers.

    Attributes:
        exchange: whose buffer and routes.
        fixed_rows: of the output; enough for every rank.
        handle: routes of a cached dispatch; None: a first one.
        x: rows sent; a replay sends what they hold then.
    """

    exchange: Exchange
    fixed_rows: int
    handle: Handle | None
    x: torch.Tensor

    def __call__(self, turn: int = 0) -> tuple[DispatchResult, CombineResult]:
        buffer, inputs = self.exchange.buffer, self.exchange.inputs
        if self.handle is not None:
            received = buffer.dispatch(self.x, handle=self.handle)
        else:
            received = buffer.dispatch(
                self.x, inputs.topk_idx, inputs.topk_weights, fixed_rows=self.fixed_rows
            )
        return received, buffer.combine(received.x, received.handle)


def replay(exchange: Exchange, out: Table, effort: Effort, *, cached: bool) -> None:
    """Capture, replay, check what the replays deliver, and time them."""
    inputs = exchange.inputs
    fixed_rows = -(-max(exchange.rows_R) // 256) * 256
    first = exchange.buffer.dispatch(
        inputs.rows[0], inputs.topk_idx, inputs.topk_weights, fixed_rows=fixed_rows
    )
    handle = first.handle if cached else None
    del first
    calls = _Calls(exchange, fixed_rows, handle, inputs.rows[0].clone())
    seconds = time_calls(exchange.comm, calls, effort)
    host = host_time(exchange.comm, calls, effort)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls()  # what is made at a first use must not be made during the capture
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls()  # kept: replays write there
    # Wrong rows go once around; then the right ones, which only a replay that moves data delivers.
    for rows in (inputs.rows[1], inputs.rows[0]):
        calls.x.copy_(rows)
        graph.replay()
    torch.cuda.synchronize()
    check_sums(exchange, captured[1].x, [1.0] * exchange.shape.ranks)
    replayed = time_calls(exchange.comm, lambda turn: graph.replay(), effort)
    replayed_host = host_time(exchange.comm, lambda turn: graph.replay(), effort)
    torch.cuda.synchronize()
    size = least_bytes(exchange, "BF16") + least_bytes(exchange, None)
    name = f"{'cached' if cached else 'first'} dispatch + combine"
    out.add("graph", exchange, f"{name}, calls", seconds, size, host)
    out.add("graph", exchange, f"{name}, replay", replayed, size, replayed_host)
