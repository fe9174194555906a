"""DeepSeek-V3's gate: sigmoid affinities, selection bias, node-limited group selection.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), sections 2.1.2 and 4.2. The report scores
a group by the sum of its K/M highest affinities; the released inference code takes the two
highest *biased* ones, which for K=8, M=4 is the same number. Biased affinities are used here.

Letters: T tokens, E experts, K experts per token, G groups, M groups kept per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .result import Routing, check_sizes


@dataclass(frozen=True)
class GateConfig:
    """The sizes of a gate.

    Attributes:
        num_experts: E.
        num_topk: K, experts per token.
        num_groups: G, groups of E/G contiguous expert ids; 1 switches the limit off.
        topk_groups: M, groups a token may use; None means all G.
        group_score_topk: biased affinities summed into a group's score; None means K // M, at
            least 1 and at most the group's size.
        routed_scaling_factor: multiplies the normalised weights (2.5 in DeepSeek-V3).

    Raises:
        ValueError: E is not a multiple of G, M is not in 1..G, or M groups hold fewer than K
            experts.
    """

    num_experts: int
    num_topk: int
    num_groups: int = 1
    topk_groups: int | None = None
    group_score_topk: int | None = None
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        check_sizes(0, self.num_experts, self.num_topk)
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(
                f"num_groups must divide num_experts={self.num_experts}, got {self.num_groups}"
            )
        if not 1 <= self.kept_groups <= self.num_groups:
            raise ValueError(
                f"topk_groups must be between 1 and num_groups={self.num_groups}, "
                f"got {self.topk_groups}"
            )
        if self.kept_groups * self.group_size < self.num_topk:
            raise ValueError(
                f"topk_groups={self.kept_groups} groups of {self.group_size} experts hold fewer "
                f"than num_topk={self.num_topk} experts"
            )
        if not 1 <= self.summed_affinities <= self.group_size:
            raise ValueError(
                f"group_score_topk must be between 1 and the group size {self.group_size}, "
                f"got {self.group_score_topk}"
            )

    @property
    def group_size(self) -> int:
        """Experts in a group, E/G."""
        return self.num_experts // self.num_groups

    @property
    def kept_groups(self) -> int:
        """M."""
        return self.num_groups if self.topk_groups is None else self.topk_groups

    @property
    def summed_affinities(self) -> int:
        """How many affinities make a group's score."""
        if self.group_score_topk is not None:
            return self.group_score_topk
        return min(max(1, self.num_topk // self.kept_groups), self.group_size)


def gate(
    affinity_TE: torch.Tensor, config: GateConfig, bias_E: torch.Tensor | None = None
) -> Routing:
    """Select K experts per token and weigh them.

    The bias takes part in the selection only: groups are scored by the sum of their highest
    ``affinity + bias``, the best M groups are kept, and the K highest ``affinity + bias`` inside
    them are selected, in descending order. The weights are the unbiased affinities of the
    selected experts divided by their sum, times ``routed_scaling_factor``.

    Ties are broken towards the lowest id: of two equal groups the first is kept, of two equal
    experts the lower id is selected, and listed, first. The result is therefore a function of
    the affinities alone.

    Args:
        affinity_TE: float32 ``[T, E]`` on the CPU, finite and not negative;
            ``torch.sigmoid(logits_TE)`` in DeepSeek-V3.
        config: the gate's sizes.
        bias_E: float32 ``[E]``, finite, or None for no bias.

    Returns:
        The routing. A row whose selected affinities are all 0 gets weights 0.

    Raises:
        TypeError: a tensor is not float32.
        ValueError: a shape is wrong, or a value is not finite or an affinity negative.
    """
    _check_inputs(affinity_TE, config, bias_E)
    biased_TE = affinity_TE if bias_E is None else affinity_TE + bias_E
    if config.kept_groups < config.num_groups:
        biased_TE = _mask_groups(biased_TE, config)
    topk_idx_TK = topk_lowest_id(biased_TE, config.num_topk)
    selected_TK = affinity_TE.gather(1, topk_idx_TK)
    total_T1 = selected_TK.sum(dim=1, keepdim=True)
    total_T1 = total_T1.clamp_min(torch.finfo(torch.float32).tiny)
    return Routing(topk_idx_TK, selected_TK / total_T1 * config.routed_scaling_factor)


def _check_inputs(
    affinity_TE: torch.Tensor, config: GateConfig, bias_E: torch.Tensor | None
) -> None:
    if affinity_TE.dtype != torch.float32:
        raise TypeError(f"affinity_TE must be float32, got {affinity_TE.dtype}")
    if affinity_TE.ndim != 2 or affinity_TE.shape[1] != config.num_experts:
        raise ValueError(
            f"affinity_TE must be [T, {config.num_experts}], got {list(affinity_TE.shape)}"
        )
    if affinity_TE.numel():
        low, high = (x.item() for x in affinity_TE.aminmax())
        if not 0 <= low <= high < float("inf"):  # also false when NaN
            raise ValueError(
                f"affinity_TE must be finite and not negative, got values in [{low}, {high}]"
            )
    if bias_E is None:
        return
    if bias_E.dtype != torch.float32:
        raise TypeError(f"bias_E must be float32, got {bias_E.dtype}")
    if bias_E.shape != (config.num_experts,):
        raise ValueError(f"bias_E must be [{config.num_experts}], got {list(bias_E.shape)}")
    if not torch.isfinite(bias_E).all():
        raise ValueError("bias_E must be finite")


def _mask_groups(biased_TE: torch.Tensor, config: GateConfig) -> torch.Tensor:
    """Put -inf on the experts outside each token's M best groups."""
    grouped_TGS = biased_TE.view(-1, config.num_groups, config.group_size)
    best_TGk = grouped_TGS.topk(config.summed_affinities, dim=2).values
    # In float64 a few float32 values of similar size add up exactly, so ties do not depend on
    # the order of the summation.
    group_score_TG = best_TGk.double().sum(dim=2)
    kept_TM = topk_lowest_id(group_score_TG, config.kept_groups)
    dropped_TG = torch.ones_like(group_score_TG, dtype=torch.bool).scatter_(1, kept_TM, False)
    return grouped_TGS.masked_fill(dropped_TG[:, :, None], float("-inf")).view_as(biased_TE)


def topk_lowest_id(values_TN: torch.Tensor, k: int) -> torch.Tensor:
    """Return the indices of the k largest values per row, ties to the lowest index.

    ``torch.topk`` leaves the choice among equal values open; a full stable sort does not, but
    is four times slower. Here the sort is confined to the rows that have a tie at the boundary.

    Args:
        values_TN: ``[T, N]`` without NaN.
        k: at most N.

    Returns:
        int64 ``[T, k]``, in descending order of value, then ascending index.
    """
    n = values_TN.shape[1]
    top = torch.topk(values_TN, min(k + 1, n), dim=1)
    idx_Tk = top.indices[:, :k].sort(dim=1).values
    order_Tk = values_TN.gather(1, idx_Tk).sort(dim=1, descending=True, stable=True).indices
    idx_Tk = idx_Tk.gather(1, order_Tk)
    if k < n:
        tied_T = top.values[:, k - 1] == top.values[:, k]
        if tied_T.any():
            full = values_TN[tied_T].sort(dim=1, descending=True, stable=True)
            idx_Tk[tied_T] = full.indices[:, :k]
    return idx_Tk


def update_bias(bias_E: torch.Tensor, load_E: torch.Tensor, gamma: float = 0.001) -> torch.Tensor:
    """One step of DeepSeek-V3's balancing without auxiliary loss (report, section 2.1.2).

    Args:
        bias_E: float32 ``[E]``.
        load_E: ``[E]``, tokens each expert received in the step, over all ranks.
        gamma: the bias update speed (0.001 for most of DeepSeek-V3's training).

    Returns:
        A new tensor: ``bias - gamma`` where the load is above the mean (overloaded),
        ``bias + gamma`` where it is below, unchanged where it equals the mean.

    Raises:
        ValueError: the shapes differ.
    """
    if bias_E.ndim != 1 or bias_E.shape != load_E.shape:
        raise ValueError(
            f"bias_E and load_E must both be [E], got {list(bias_E.shape)} and {list(load_E.shape)}"
        )
    load_E = load_E.double()
    return bias_E + gamma * torch.sign(load_E.mean() - load_E).to(bias_E.dtype)
