"""The result every routing source returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Routing:
    """Which experts each of T tokens goes to, and with what weight.

    Attributes:
        topk_idx_TK: int64 ``[T, K]`` on the CPU, global expert ids, distinct within a row;
            -1 marks a slot that is not used.
        topk_weights_TK: float32 ``[T, K]`` on the CPU; 0 where the slot is not used.
    """

    topk_idx_TK: torch.Tensor
    topk_weights_TK: torch.Tensor

    def __post_init__(self) -> None:
        assert self.topk_idx_TK.dtype == torch.int64
        assert self.topk_weights_TK.dtype == torch.float32
        assert self.topk_idx_TK.shape == self.topk_weights_TK.shape

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.topk_idx_TK.shape[0]

    @property
    def num_topk(self) -> int:
        """K."""
        return self.topk_idx_TK.shape[1]


def check_sizes(num_tokens: int, num_experts: int, num_topk: int) -> None:
    """Raise ValueError unless ``num_tokens >= 0`` and ``1 <= num_topk <= num_experts``."""
    if num_tokens < 0:
        raise ValueError(f"num_tokens must be at least 0, got {num_tokens}")
    if not 1 <= num_topk <= num_experts:
        raise ValueError(
            f"num_topk must be between 1 and num_experts={num_experts}, got {num_topk}"
        )
