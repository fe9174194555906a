"""Where a dispatch sent its tokens, kept on the device for the calls that go the same way."""

from dataclasses import dataclass
from typing import Any

import torch

from ..native import align
from ..topology import Topology
from . import abi
from .two_hop import Hops

#: Routes in one allocation, and words that it may have; a handle keeps the whole of it.
_TOGETHER = 8
_MOST_WORDS = 1 << 18
_make_block: Any = abi.structures.get("routes")


@dataclass(frozen=True)
class Shape:
    """What a buffer was made for: ranks R, experts E, choices K."""

    topology: Topology
    num_experts: int
    num_topk: int

    @property
    def rank(self) -> int:
        """This rank."""
        return self.topology.rank

    @property
    def num_ranks(self) -> int:
        """R."""
        return self.topology.num_ranks

    @property
    def world_size(self) -> tuple[int, int, int]:
        """What the size of an announcement depends on: N, R, E."""
        return self.topology.num_nodes, self.num_ranks, self.num_experts


class RoutesMemory:
    """Device memory for routes, several to an allocation, each part used once.

    An allocation belongs to one stream, as every tensor of torch's, and lives as long as routes in
    it do.

    Args:
        together: routes of an allocation at most.
    """

    def __init__(self, together: int = _TOGETHER) -> None:
        self._together = together
        self._memory: torch.Tensor | None = None
        self._at = self._end = 0
        self._stream = -1

    def take(self, like: torch.Tensor, words: int, stream: int) -> tuple[torch.Tensor, int]:
        """Memory (int64) and where in it ``words`` are that nothing has used.

        Args:
            like: an int64 tensor on the device.
            words: 8 bytes each.
            stream: address of the current stream.
        """
        if words > self._end - self._at or stream != self._stream:
            count = max(1, min(self._together, _MOST_WORDS // words))
            self._memory = like.new_empty(words * count)
            self._at, self._end, self._stream = 0, words * count, stream
        assert self._memory is not None
        at = self._at
        self._at += words
        return self._memory, at


class Routes:
    """Device arrays a dispatch leaves for the calls that use its routes again.

    Attributes:
        memory: int64, others' routes may lie there too. From word ``at`` on: 8 bytes per (token,
            copy) [T, D]; then, int32, rows at every rank [R], first row of every local expert and
            the end [E/R + 1], rows of every local expert [E/R], the dispatch's verdict [1].
        topk_idx: global expert ids, int64 [T, K]; not before ``use``.
        number: of the dispatch; not before it.
        by_expert: layout "expert".
        block: ``epcomm_cuda_routes``.
        hops: with several nodes, what the second hop needs.
    """

    topk_idx: torch.Tensor
    number: int
    hops: Hops | None = None

    def __init__(
        self,
        shape: Shape,
        like: torch.Tensor,
        max_dests: int,
        by_expert: bool,
        memory: RoutesMemory,
        stream: int,
    ) -> None:
        num_tokens = like.shape[0]
        R, local = shape.num_ranks, shape.num_experts // shape.num_ranks
        self._num_dests = num_tokens * max_dests
        self._num_words = self._num_dests + (R + 2 * local + 3) // 2
        # The next routes begin at a multiple of 128 bytes again.
        self.memory, self._at = memory.take(like, align(self._num_words, 16), stream)
        self.by_expert = by_expert
        self.num_tokens = num_tokens
        self.max_dests = max_dests
        self._shape = shape
        dests = self.memory.data_ptr() + 8 * self._at
        counts = dests + 8 * self._num_dests
        starts = counts + 4 * R
        groups = starts + 4 * (local + 1)
        self.block = _make_block(
            0,
            dests,
            counts,
            starts,
            groups,
            groups + 4 * local,
            num_tokens,
            max_dests,
        )

    def use(self, topk_idx: torch.Tensor) -> None:
        """For these choices, of as many tokens."""
        self.topk_idx = topk_idx
        self.block.topk_idx = topk_idx.data_ptr()

    @property
    def dest_ranks(self) -> torch.Tensor:
        """Rank of every copy, or -1, int16 [T, D]."""
        dests = self.memory[self._at : self._at + self._num_dests].view(torch.int16)
        return dests.view(self.num_tokens, self.max_dests, 4)[..., 0]

    @property
    def _counts(self) -> torch.Tensor:
        counts = self.memory[self._at + self._num_dests : self._at + self._num_words]
        return counts.view(torch.int32)

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        """Rows of every local expert without padding, int32 [E/R], on the device."""
        R, local = self._shape.num_ranks, self._shape.num_experts // self._shape.num_ranks
        return self._counts[R + local + 1 : R + 2 * local + 1]

    def count_rows(self) -> int:
        """Rows of this rank's output (waits for the device)."""
        return int(self._counts[self._shape.rank])
