"""The alternative: one all-to-all of BF16 rows, one row per (token, rank), written with care.

What a competent user writes without epcomm, over any all-to-all with counts: buffers are kept
between calls, rows are packed with one gather, all metadata of a row travel in one message beside
it, the expert outputs are sent from where they are, and the reduction is one compiled pass that
accumulates in float32 in rank order. It has no notion of nodes and sends no FP8.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from epcomm.formats.kernels import add_bf16_row, f32_to_bf16_row

from .options import Shape
from .workload import Inputs


class Exchange(Protocol):
    """An all-to-all with counts."""

    name: str
    rank: int

    def counts(self, send_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tell every rank how many rows it gets; returns what each rank sends here."""

    def rows(
        self,
        send: torch.Tensor,
        send_R: NDArray[np.int64],
        receive: torch.Tensor,
        receive_R: NDArray[np.int64],
    ) -> None:
        """Exchange rows, grouped by rank on both sides."""


@njit(cache=True, nogil=True)
def _reduce(
    rows_SH: NDArray[np.uint16],
    places_S: NDArray[np.int64],
    first_T: NDArray[np.int64],
    out_TH: NDArray[np.uint16],
) -> None:
    total = np.empty(out_TH.shape[1], np.float32)
    for t in range(out_TH.shape[0]):
        total[:] = 0
        for i in range(first_T[t], first_T[t + 1]):
            add_bf16_row(rows_SH[places_S[i]], total)
        f32_to_bf16_row(total, out_TH[t])


class Buffers:
    """Tensors that only ever grow, so that no timed call waits for the kernel's fresh pages."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        kept = self._kept.get(name)
        if kept is None or kept.numel() < rows * columns:
            kept = self._kept[name] = torch.empty(rows * columns, dtype=dtype)
        return kept[: rows * columns].view(rows, columns)


class FlatCase:
    """Dispatch and combine over one :class:`Exchange`.

    Attributes:
        name: for the tables.
        phases: seconds by phase of the last call.
        rows_MH: bfloat16 rows received, by (source rank, source token); combine sends them back.
        meta_MC: int32 ``[M, 1 + 2K]``: source token, local expert ids or -1, weights as bits.
        out_TH: bfloat16 sums of the last combine.

    """

    def __init__(self, exchange: Exchange, shape: Shape, inputs: Inputs, buffers: Buffers) -> None:
        self.name = exchange.name
        self.phases: dict[str, float] = {}
        self._since = 0.0
        self._exchange = exchange
        self._shape = shape
        self._inputs = inputs
        self._buffers = buffers

    def prepare(self, step: str) -> None:
        """Nothing precedes a step."""

    def steps(self) -> dict[str, Callable[[], object]]:
        """Dispatch, then combine."""
        return {"dispatch": self.dispatch, "combine": self.combine}

    def _mark(self, phase: str) -> None:
        now = time.perf_counter()
        self.phases[phase] = now - self._since
        self._since = now

    def _begin(self) -> None:
        self.phases = {}
        self._since = time.perf_counter()

    def dispatch(self) -> None:
        """Send every token once to each rank that holds one of its experts."""
        self._begin()
        shape, inputs, exchange = self._shape, self._inputs, self._exchange
        rank_TK = inputs.topk_idx_TK.div(shape.experts_per_rank, rounding_mode="floor")
        # One column more swallows the dropped choices, whose rank is -1.
        sent_TR = torch.zeros(shape.tokens, shape.ranks + 1, dtype=torch.bool)
        sent_TR.scatter_(1, rank_TK.where(rank_TK >= 0, shape.ranks), True)
        to_S, self._token_S = sent_TR[:, : shape.ranks].T.nonzero(as_tuple=True)
        self._send_R = torch.bincount(to_S, minlength=shape.ranks).numpy()
        self._mark("layout")
        self._receive_R = exchange.counts(self._send_R)
        self._mark("counts")

        sent, received = len(to_S), int(self._receive_R.sum())
        columns = 1 + 2 * shape.topk
        send_SH = self._buffers.take("send", sent, shape.hidden, torch.bfloat16)
        meta_SC = self._buffers.take("send_meta", sent, columns, torch.int32)
        torch.index_select(inputs.x_TH, 0, self._token_S, out=send_SH)
        idx_SK = inputs.topk_idx_TK[self._token_S] - to_S[:, None] * shape.experts_per_rank
        away_SK = (idx_SK < 0) | (idx_SK >= shape.experts_per_rank)
        weights_SK = inputs.topk_weights_TK[self._token_S].masked_fill_(away_SK, 0.0)
        meta_SC[:, 0] = self._token_S
        meta_SC[:, 1 : 1 + shape.topk] = idx_SK.masked_fill_(away_SK, -1)
        meta_SC[:, 1 + shape.topk :] = weights_SK.view(torch.int32)
        self._mark("pack")

        self.rows_MH = self._buffers.take("receive", received, shape.hidden, torch.bfloat16)
        self.meta_MC = self._buffers.take("receive_meta", received, columns, torch.int32)
        exchange.rows(meta_SC, self._send_R, self.meta_MC, self._receive_R)
        exchange.rows(send_SH, self._send_R, self.rows_MH, self._receive_R)
        self._mark("exchange")

        # How to find a token's rows when they come back; stable, so in rank order.
        self._places_S = self._token_S.argsort(stable=True).numpy()
        self._first_T = np.zeros(shape.tokens + 1, np.int64)
        np.cumsum(sent_TR[:, : shape.ranks].sum(1).numpy(), out=self._first_T[1:])
        self._mark("index")

    def combine(self) -> None:
        """Send ``rows_MH`` back, as if the experts had overwritten them, and sum per token."""
        self._begin()
        shape = self._shape
        # The rows sent are no longer needed: their place takes the rows that return.
        back_SH = self._buffers.take("send", len(self._places_S), shape.hidden, torch.bfloat16)
        self._exchange.rows(self.rows_MH, self._receive_R, back_SH, self._send_R)
        self._mark("exchange")
        self.out_TH = self._buffers.take("out", shape.tokens, shape.hidden, torch.bfloat16)
        _reduce(_bits(back_SH), self._places_S, self._first_T, _bits(self.out_TH))
        self._mark("reduce")


def _bits(x: torch.Tensor) -> Any:
    return x.view(torch.uint16).numpy()
