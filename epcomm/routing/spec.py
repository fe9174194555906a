"""Make a routing from a one-line description, for benchmarks and tests."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from .gate import GateConfig, gate
from .load_sampler import Placement, profile_sampler, zipf_sampler
from .profiles import LoadProfile, list_profiles, load_profile, profile_from_counts
from .result import Routing, check_sizes
from .trace_sglang import load_expert_counts
from .traces import load_trace
from .uniform import uniform_routing

SPEC_HELP = (
    "uniform | gate | skewed | one-expert[:<expert>] | profile:<name> | "
    "profile:<counts file>[:<layer>] | trace:<file>[:<layer>]"
)


def make_routing(
    spec: str,
    num_tokens: int,
    num_experts: int,
    num_topk: int,
    *,
    seed: int = 0,
    num_groups: int = 1,
    topk_groups: int | None = None,
    placement: Placement = "random",
    placement_seed: int = 0,
) -> Routing:
    """Make the routing of one rank's tokens.

    ``spec`` is one of

    - ``uniform``: K distinct experts, uniformly; knows no groups.
    - ``gate``: the DeepSeek-V3 gate on standard normal logits.
    - ``skewed``: Zipf odds (exponent 1) through the gate; a stress test.
    - ``one-expert`` or ``one-expert:<expert>``: every token goes to that expert (0) alone, the
      other slots are -1.
    - ``profile:<name>``: expert loads as measured, see :func:`list_profiles`; or
      ``profile:<file>[:<layer>]`` with the counts of an SGLang recording.
    - ``trace:<file>[:<layer>]``: the tokens of a recorded routing, from a random place of the
      file on, beginning again at its end; see :func:`load_trace`. Weights are equal where the
      trace has none.

    Args:
        spec: see above.
        num_tokens: T of this rank.
        num_experts: E.
        num_topk: K.
        seed: of this rank's tokens; give every rank another one.
        num_groups: groups of the gate; 1 switches the limit off.
        topk_groups: groups a token may use; None means all.
        placement: which experts are hot in a profile: ``"random"`` or ``"contiguous-hot"``.
        placement_seed: the permutation's seed in ``profile`` and ``skewed``; the same on every
            rank.

    Raises:
        ValueError: the spec, a size or a file is wrong.
    """
    check_sizes(num_tokens, num_experts, num_topk)
    config = GateConfig(num_experts, num_topk, num_groups, topk_groups)
    rng = np.random.default_rng(seed)
    kind, _, argument = spec.partition(":")
    if kind in ("profile", "trace") and argument:
        if kind == "trace":
            return _from_trace(argument, num_tokens, num_experts, num_topk, rng)
        sampler = profile_sampler(_profile(argument), config, placement, placement_seed)
        return sampler.sample(num_tokens, rng)
    if kind == "one-expert" and (argument.isdecimal() or spec == kind):
        return _one_expert(int(argument or 0), num_tokens, num_experts, num_topk)
    if spec == "uniform":
        return uniform_routing(num_tokens, num_experts, num_topk, rng)
    if spec == "gate":
        logits_TE = rng.standard_normal((num_tokens, num_experts), dtype=np.float32)
        return gate(torch.from_numpy(logits_TE).sigmoid_(), config)
    if spec == "skewed":
        return zipf_sampler(config, placement_seed=placement_seed).sample(num_tokens, rng)
    raise ValueError(f"routing spec must be {SPEC_HELP}; got {spec!r}")


def _split_layer(argument: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.+):(\d+)", argument)
    return (match[1], int(match[2])) if match else (argument, None)


def _profile(argument: str) -> LoadProfile:
    path, layer = _split_layer(argument)
    if argument in list_profiles() or not Path(path).is_file():
        return load_profile(argument)
    return profile_from_counts(load_expert_counts(path), name=argument, layer=layer)


def _from_trace(
    argument: str, num_tokens: int, num_experts: int, num_topk: int, rng: np.random.Generator
) -> Routing:
    path, layer = _split_layer(argument)
    trace = load_trace(path, layer=layer, num_experts=num_experts)
    recorded, recorded_topk = trace.topk_idx_TK.shape
    if recorded_topk != num_topk:
        raise ValueError(f"num_topk must be {recorded_topk} as in {path}, got {num_topk}")
    if recorded == 0 and num_tokens > 0:
        raise ValueError(f"{path}: layer {trace.layer} has no tokens")
    start = int(rng.integers(recorded)) if recorded else 0
    row_T = (torch.arange(num_tokens) + start) % max(recorded, 1)
    topk_idx_TK = trace.topk_idx_TK[row_T]
    if trace.topk_weights_TK is not None:
        return Routing(topk_idx_TK, trace.topk_weights_TK[row_T])
    used_TK = (topk_idx_TK >= 0).float()
    return Routing(topk_idx_TK, used_TK / used_TK.sum(dim=1, keepdim=True).clamp_min(1))


def _one_expert(expert: int, num_tokens: int, num_experts: int, num_topk: int) -> Routing:
    if expert >= num_experts:
        raise ValueError(f"one-expert must be below num_experts={num_experts}, got {expert}")
    topk_idx_TK = torch.full((num_tokens, num_topk), -1, dtype=torch.int64)
    topk_weights_TK = torch.zeros(num_tokens, num_topk)
    topk_idx_TK[:, 0] = expert
    topk_weights_TK[:, 0] = 1.0
    return Routing(topk_idx_TK, topk_weights_TK)
