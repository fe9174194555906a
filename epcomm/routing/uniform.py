"""Uniform routing: every set of K experts is equally likely for every token."""

from __future__ import annotations

import numpy as np
import torch

from .result import Routing, check_sizes


def uniform_routing(
    num_tokens: int, num_experts: int, num_topk: int, rng: np.random.Generator
) -> Routing:
    """Draw K distinct experts of E uniformly for every token.

    The weights are positive and sum to 1 in each row: a point drawn uniformly from the simplex
    (normalised exponentials), independent of the experts.

    Args:
        num_tokens: T.
        num_experts: E.
        num_topk: K, at most E.
        rng: the only source of randomness.

    Raises:
        ValueError: a size is out of range.
    """
    check_sizes(num_tokens, num_experts, num_topk)
    # The K largest of E independent keys are a uniform K-subset in uniform order.
    keys_TE = rng.random((num_tokens, num_experts), dtype=np.float32)
    topk_idx_TK = torch.topk(torch.from_numpy(keys_TE), num_topk, dim=1).indices
    weights_TK = rng.standard_exponential((num_tokens, num_topk))
    weights_TK /= weights_TK.sum(axis=1, keepdims=True)
    return Routing(topk_idx_TK, torch.from_numpy(weights_TK.astype(np.float32)))
