"""What a rank must receive, without an oracle's loops: for tests that make thousands of calls.

Every token's row is a row of one table that all ranks hold, at a place that its source rank, its
number and the call decide. So a few gathers and comparisons on the device check a whole result.
Equality with the oracle, which is slow and obvious, is tested beside.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from epcomm.formats import quantize_fp8

HIDDEN = 512
#: Tokens of a rank in a call, at most; 16 ranks have rows of their own in the table.
MAX_TOKENS = 256
_ROWS = 16 * MAX_TOKENS
#: What a rank multiplies its rows by before combine, so that a sum tells which ranks it has.
FACTORS = (1.0, 2.0, 4.0)


class Table:
    """Rows in every format; the last row is the zeros of padding."""

    def __init__(self, device: torch.device) -> None:
        values = np.random.default_rng(7).integers(-128, 129, (_ROWS + 1, HIDDEN))
        values[-1] = 0  # integers of 8 bits: exact in bfloat16, and sums of them in float32
        self.bf16 = torch.from_numpy(values).to(torch.bfloat16)
        self.f32 = self.bf16.float()
        self.packed = {}
        for scales in ("f32", "ue8m0"):
            q, s = quantize_fp8(self.bf16, scales)
            q.view(torch.uint8)[-1], s[-1] = 0, 0
            self.packed[scales] = (q.to(device), s.to(device))
        self.bf16, self.f32 = self.bf16.to(device), self.f32.to(device)

    @staticmethod
    def places(base: torch.Tensor, call: int) -> torch.Tensor:
        """Rows of the table for tokens with these base places (-1: padding) in a call."""
        return torch.where(base < 0, _ROWS, (base + call * 977) % _ROWS)


@dataclass
class Expected:
    """What this rank receives in one layout; tensors on the device.

    Attributes:
        base: place in the table before the call's shift, or -1 in padding, int64 [M].
        topk_idx: None in layout expert.
        sums: per own token, the sum of the factors of the ranks that hold a copy, float32 [T, 1].
        max_rows: rows of the fullest rank.
    """

    base: torch.Tensor
    source: torch.Tensor
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor
    tokens_per_expert: list[int]
    sums: torch.Tensor
    max_rows: int


class Scenario:
    """The routings of all ranks, drawn from a seed, and what this rank makes of them.

    Attributes:
        topk, weights: of every rank, on the host.
        base: places of this rank's tokens in the table.
    """

    def __init__(
        self, seed: int, rank: int, num_ranks: int, num_experts: int, num_topk: int, tokens: int
    ) -> None:
        self._rng = np.random.default_rng([11, seed])
        self._rank, self._num_ranks = rank, num_ranks
        self._per_rank = num_experts // num_ranks
        self.alignment = (1, 4, 7)[seed % 3]
        kind = ("uniform", "skewed", "one rank", "sparse", "dropped", "uniform")[seed % 6]
        counts = self._rng.integers(0, tokens + 1, num_ranks)
        counts[self._rng.random(num_ranks) < 0.15] = 0
        self.topk = [self._draw(kind, count, num_experts, num_topk) for count in counts]
        self.weights = [self._rng.random(ids.shape, np.float32) for ids in self.topk]
        self._source = np.repeat(np.arange(num_ranks), counts)
        self._token = np.concatenate([np.arange(count) for count in counts])
        self.base = torch.from_numpy(rank * MAX_TOKENS + np.arange(counts[rank]))

    def _draw(self, kind: str, tokens: int, num_experts: int, num_topk: int) -> np.ndarray:
        scores = self._rng.gumbel(size=(tokens, num_experts))
        if kind == "skewed":
            scores -= 2.0 * np.log1p(np.arange(num_experts))
        if kind == "one rank":
            first = self._num_ranks // 2 * self._per_rank
            scores[:, first : first + max(num_topk, self._per_rank)] += 1000.0
        ids = np.argsort(-scores, axis=1)[:, :num_topk]
        share = {"sparse": 0.8, "dropped": 1.0}.get(kind, 0.1)
        return np.where(self._rng.random(ids.shape) < share, -1, ids).astype(np.int64)

    def expect(self, layout: str, device: torch.device) -> Expected:
        """What this rank must receive."""
        topk, weights = np.concatenate(self.topk), np.concatenate(self.weights)
        rank_of = np.where(topk >= 0, topk // self._per_rank, -1)
        own = rank_of[self._source == self._rank]
        factors = np.array([FACTORS[r % len(FACTORS)] for r in range(self._num_ranks)] + [0.0])
        if layout == "rank":
            (rows,) = np.nonzero((rank_of == self._rank).any(1))
            here = rank_of[rows] == self._rank
            ids: np.ndarray | None = np.where(here, topk[rows] % self._per_rank, -1)
            carried = np.where(here, weights[rows], np.float32(0))
            fullest = max((rank_of == r).any(1).sum() for r in range(self._num_ranks))
            holds = np.stack([(own == r).any(1) for r in range(self._num_ranks)], 1)
            sums = holds @ factors[:-1]
        else:
            rows, choices = self._groups(topk)
            ids = None
            carried = np.where(rows < 0, np.float32(0), weights[rows, choices])
            experts = np.bincount(topk[topk >= 0], minlength=self._per_rank * self._num_ranks)
            padded = -(-experts // self.alignment) * self.alignment
            fullest = padded.reshape(self._num_ranks, -1).sum(1).max()
            sums = factors[own].sum(1)
        local = topk[rank_of == self._rank] % self._per_rank
        source = np.stack([self._source[rows], self._token[rows]], 1).astype(np.int32)
        source[rows < 0] = -1
        base = np.where(rows < 0, -1, source[:, 0] * MAX_TOKENS + source[:, 1])
        return Expected(
            torch.from_numpy(base.astype(np.int64)).to(device),
            torch.from_numpy(source).to(device),
            None if ids is None else torch.from_numpy(ids).to(device),
            torch.from_numpy(carried).to(device),
            np.bincount(local, minlength=self._per_rank).tolist(),
            torch.from_numpy(sums.astype(np.float32)[:, None]).to(device),
            int(fullest),
        )

    def _groups(self, topk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Layout expert: (token over all ranks, choice) of every row, -1 in padding."""
        rows, choices = [], []
        for expert in range(self._rank * self._per_rank, (self._rank + 1) * self._per_rank):
            token, choice = np.nonzero(topk == expert)
            padding = np.full(-len(token) % self.alignment, -1)
            rows += [token, padding]
            choices += [choice, padding]
        return np.concatenate(rows), np.concatenate(choices)


def differs(got: Any, want: torch.Tensor | None) -> torch.Tensor | bool:
    """Whether any bit differs; stays on the device where it can."""
    if got is None or want is None:
        return (got is None) != (want is None)
    if got.shape != want.shape or got.dtype != want.dtype:
        return True
    if got.numel() == 0:
        return False
    if got.dtype.is_floating_point:
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
        got, want = got.view(bits), want.view(bits)
    return (got != want).any()
