"""Measured expert-load profiles of DeepSeek-V3: how unevenly real traffic uses the experts.

The data are statistics of published per-expert token counts (12 workloads of prefill and decode,
58 MoE layers of 256 experts, top-8); provenance is in the data file's ``_about`` block, see
:func:`profiles_about`. They are marginals: they say how often each expert is chosen, not which
experts are chosen together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

_DATA_FILE = "deepseek_v3_expert_load_profiles.json"
# Up to this rank the sorted curves fall like a power of the rank, beyond it exponentially; the
# mean of the curve so interpolated is within 1 % of 1 on all profiles (linear: up to 2.9 % off).
_POWER_LAW_RANKS = 8


@dataclass(frozen=True)
class LoadProfile:
    """A sorted expert-load curve.

    Attributes:
        name: for messages.
        num_experts: experts the curve was measured on.
        ranks: positions in the descending order for which a load is known; the first is 0, the
            last ``num_experts - 1``.
        sorted_load: at each of those positions, the load divided by the mean load, averaged over
            the measured layers.
        cv: standard deviation / mean of the loads, averaged over layers; None if unknown.
        rank_load: measured max/mean rank load by number of ranks (experts placed contiguously,
            mean over layers); empty if unknown.
    """

    name: str
    num_experts: int
    ranks: tuple[int, ...]
    sorted_load: tuple[float, ...]
    cv: float | None = None
    rank_load: dict[int, float] = field(default_factory=dict, compare=False)

    @property
    def max_over_mean(self) -> float:
        """Load of the hottest expert / mean load, averaged over the measured layers."""
        return self.sorted_load[0]

    def curve(self, num_experts: int) -> npt.NDArray[np.float64]:
        """Interpolate the sorted curve to ``num_experts`` experts.

        The ends map to the ends and the positions between them proportionally. The result is
        scaled to mean 1; on the measured number of experts that changes it by less than 1 %,
        on few experts by more (the hottest expert of 8 cannot exceed 8 times the mean).

        Returns:
            float64 ``[num_experts]``, descending, mean 1.

        Raises:
            ValueError: ``num_experts`` is below 1.
        """
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        position_E = np.linspace(0, self.num_experts - 1, num_experts)
        ranks = np.asarray(self.ranks, dtype=np.float64)
        log_load = np.log(np.maximum(self.sorted_load, 1e-6))  # an unused expert has load 0
        head_E = np.interp(np.log1p(position_E), np.log1p(ranks), log_load)
        tail_E = np.interp(position_E, ranks, log_load)
        load_E = np.exp(np.where(position_E <= _POWER_LAW_RANKS, head_E, tail_E))
        return load_E / load_E.mean()


def profile_from_counts(
    counts_LE: npt.ArrayLike, *, name: str = "counts", layer: int | None = None
) -> LoadProfile:
    """Make a profile of token counts per layer and expert, such as an SGLang recorder's.

    Args:
        counts_LE: ``[layers, experts]``, non-negative. Layers that count nothing (dense ones)
            are left out.
        name: for messages.
        layer: use this layer only; None averages the sorted curves of all layers.

    Raises:
        ValueError: the array is not 2-D, has a negative or non-finite count, ``layer`` is out of
            range, or nothing was counted.
    """
    counts = np.asarray(counts_LE, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[1] == 0:
        raise ValueError(f"{name}: counts must be [layers, experts], got {list(counts.shape)}")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError(f"{name}: counts must be finite and not negative")
    if layer is not None:
        if not 0 <= layer < counts.shape[0]:
            raise ValueError(f"{name}: layer must be in 0..{counts.shape[0] - 1}, got {layer}")
        counts = counts[layer : layer + 1]
    counts = counts[counts.sum(axis=1) > 0]
    if not len(counts):
        raise ValueError(f"{name}: no tokens were counted")
    load = counts / counts.mean(axis=1, keepdims=True)
    sorted_load = -np.sort(-load, axis=1)
    num_experts = counts.shape[1]
    return LoadProfile(
        name=name,
        num_experts=num_experts,
        ranks=tuple(range(num_experts)),
        sorted_load=tuple(sorted_load.mean(axis=0).tolist()),
        cv=float(load.std(axis=1).mean()),
        rank_load={
            r: float(rank_loads(load, r).max(axis=-1).mean())
            for r in (8, 16, 32, 64, 128, 256)
            if num_experts % r == 0
        },
    )


def rank_loads(load_E: npt.ArrayLike, num_ranks: int) -> npt.NDArray[np.float64]:
    """Mean load of each rank's experts, placed contiguously: ``[..., E]`` to ``[..., R]``."""
    load = np.asarray(load_E, dtype=np.float64)
    return load.reshape(*load.shape[:-1], num_ranks, -1).mean(axis=-1)


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    file = resources.files(__package__) / "data" / _DATA_FILE
    return json.loads(file.read_text(encoding="utf-8"))


def profiles_about() -> dict[str, str]:
    """Where the measured profiles come from and how they were computed."""
    return dict(_data()["_about"])


def list_profiles() -> tuple[str, ...]:
    """Names of the measured profiles."""
    return tuple(_data()["workloads"])


def load_profile(name: str) -> LoadProfile:
    """Return the measured profile of that name.

    Raises:
        ValueError: there is no such profile.
    """
    workload = _data()["workloads"].get(name)
    if workload is None:
        raise ValueError(f"unknown profile {name!r}; known: {', '.join(list_profiles())}")
    ranks = tuple(workload["sorted_load_k"])
    return LoadProfile(
        name=name,
        num_experts=ranks[-1] + 1,
        ranks=ranks,
        sorted_load=tuple(workload["sorted_load_mean"]),
        cv=workload["cv_mean"],
        rank_load={int(r): stats["mean"] for r, stats in workload["rank_load"].items()},
    )
