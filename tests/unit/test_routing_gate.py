import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epcomm.routing import GateConfig, gate, update_bias


def gate_of_one_token(s, bias, config):
    """Apply the gate to one token, as the report words it, in plain Python."""
    biased = [a + b for a, b in zip(s, bias, strict=True)]
    size = config.num_experts // config.num_groups
    group_scores = []
    for g in range(config.num_groups):
        members = sorted(biased[g * size : (g + 1) * size], reverse=True)
        group_scores.append(math.fsum(members[: config.summed_affinities]))
    by_score = sorted(range(config.num_groups), key=lambda g: (-group_scores[g], g))
    kept = by_score[: config.kept_groups]
    candidates = [e for e in range(config.num_experts) if e // size in kept]
    chosen = sorted(candidates, key=lambda e: (-biased[e], e))[: config.num_topk]
    total = sum(s[e] for e in chosen)
    scale = config.routed_scaling_factor
    return chosen, [s[e] / total * scale if total > 0 else 0.0 for e in chosen]


@st.composite
def gate_cases(draw):
    num_groups = draw(st.integers(1, 5))
    size = draw(st.integers(1, 6))
    topk_groups = draw(st.integers(1, num_groups))
    num_topk = draw(st.integers(1, topk_groups * size))
    config = GateConfig(
        num_groups * size,
        num_topk,
        num_groups,
        topk_groups,
        group_score_topk=draw(st.none() | st.integers(1, size)),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )
    # Eighths are exact in float32 and few, so that ties are the rule.
    eighths = st.integers(0, 8).map(lambda n: n / 8)
    tokens = draw(st.integers(0, 4))
    rows = st.lists(eighths, min_size=config.num_experts, max_size=config.num_experts)
    bias_value = st.integers(-8, 8).map(lambda n: n / 8)
    bias = st.lists(bias_value, min_size=config.num_experts, max_size=config.num_experts)
    return config, draw(st.lists(rows, min_size=tokens, max_size=tokens)), draw(bias)


@settings(max_examples=200, deadline=None)
@given(gate_cases())
def test_gate_is_the_loop_version_ties_included(case):
    config, rows, bias = case
    s_TE = torch.tensor(rows, dtype=torch.float32).reshape(-1, config.num_experts)
    routing = gate(s_TE, config, torch.tensor(bias, dtype=torch.float32))
    assert routing.topk_idx_TK.dtype == torch.int64
    assert routing.topk_weights_TK.dtype == torch.float32
    assert routing.topk_idx_TK.shape == (len(rows), config.num_topk)
    for row, idx, weights in zip(
        rows, routing.topk_idx_TK.tolist(), routing.topk_weights_TK.tolist(), strict=True
    ):
        expected_idx, expected_weights = gate_of_one_token(row, bias, config)
        assert idx == expected_idx
        assert weights == pytest.approx(expected_weights, rel=1e-6)


def test_gate_is_the_loop_version_at_deepseek_sizes():
    config = GateConfig(256, 8, 8, 4, routed_scaling_factor=2.5)
    rng = np.random.default_rng(3)
    s_TE = torch.from_numpy(rng.standard_normal((64, 256), dtype=np.float32)).sigmoid()
    bias_E = torch.from_numpy(rng.normal(0, 0.05, 256).astype(np.float32))
    routing = gate(s_TE, config, bias_E)
    # The oracle must see the float32 sum, or rounding could reorder two experts.
    biased_TE = (s_TE + bias_E).double()
    for t in range(64):
        s = s_TE[t].double()
        expected_idx, expected_weights = gate_of_one_token(
            s.tolist(), (biased_TE[t] - s).tolist(), config
        )
        assert routing.topk_idx_TK[t].tolist() == expected_idx
        assert routing.topk_weights_TK[t].tolist() == pytest.approx(expected_weights, rel=1e-5)


def test_bias_selects_but_does_not_weigh():
    s_TE = torch.tensor([[0.5, 0.25, 0.25, 0.125]])
    bias_E = torch.tensor([-1.0, 0.0, 0.0, 1.0])
    routing = gate(s_TE, GateConfig(4, 2), bias_E)
    assert routing.topk_idx_TK.tolist() == [[3, 1]]
    assert routing.topk_weights_TK.tolist() == [pytest.approx([1 / 3, 2 / 3])]


def test_all_equal_takes_the_lowest_ids():
    s_TE = torch.full((3, 256), 0.5)
    assert gate(s_TE, GateConfig(256, 8, 8, 4)).topk_idx_TK.tolist() == [list(range(8))] * 3


def test_a_group_is_scored_by_its_top_two():
    # Group 0 has the single best expert, group 1 the better pair.
    s_TE = torch.tensor([[0.9, 0.0, 0.5, 0.5]])
    assert gate(s_TE, GateConfig(4, 2, 2, 1)).topk_idx_TK.tolist() == [[2, 3]]
    top_one = GateConfig(4, 2, 2, 1, group_score_topk=1)
    assert gate(s_TE, top_one).topk_idx_TK.tolist() == [[0, 1]]


def test_all_zero_affinities_weigh_zero():
    routing = gate(torch.zeros(1, 4), GateConfig(4, 2))
    assert routing.topk_weights_TK.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((8, 0), "num_topk"),
        ((8, 9), "num_topk"),
        ((8, 2, 3), "num_groups"),
        ((8, 2, 0), "num_groups"),
        ((8, 2, 4, 5), "topk_groups"),
        ((8, 2, 4, 0), "topk_groups"),
        ((8, 3, 4, 1), "fewer than num_topk"),
        ((8, 2, 4, 2, 3), "group_score_topk"),
    ],
)
def test_config_refuses(sizes, named):
    with pytest.raises(ValueError, match=named):
        GateConfig(*sizes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1])
def test_gate_refuses_values(bad):
    s_TE = torch.full((2, 4), 0.5)
    s_TE[1, 2] = bad
    with pytest.raises(ValueError, match="affinity_TE"):
        gate(s_TE, GateConfig(4, 2))


def test_gate_refuses_shapes_and_types():
    config = GateConfig(4, 2)
    with pytest.raises(TypeError, match="float32"):
        gate(torch.zeros(2, 4, dtype=torch.float64), config)
    with pytest.raises(ValueError, match=r"\[T, 4\]"):
        gate(torch.zeros(2, 5), config)
    with pytest.raises(ValueError, match=r"bias_E must be \[4\]"):
        gate(torch.zeros(2, 4), config, torch.zeros(5))
    with pytest.raises(ValueError, match="finite"):
        gate(torch.zeros(2, 4), config, torch.full((4,), float("nan")))


def test_update_bias_moves_against_the_load():
    bias_E = torch.zeros(3)
    moved_E = update_bias(bias_E, torch.tensor([30, 10, 20]), gamma=0.5)
    assert moved_E.tolist() == [-0.5, 0.5, 0.0]
    assert bias_E.tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="both be"):
        update_bias(bias_E, torch.zeros(4))


def test_update_bias_balances_a_skewed_gate():
    config = GateConfig(32, 4, 8, 4)
    rng = np.random.default_rng(0)
    offset_E = np.linspace(1, -1, 32, dtype=np.float32)
    bias_E = torch.zeros(32)
    imbalance = []
    for _ in range(60):
        logits_TE = rng.standard_normal((512, 32), dtype=np.float32) + offset_E
        routing = gate(torch.from_numpy(logits_TE).sigmoid(), config, bias_E)
        load_E = routing.topk_idx_TK.flatten().bincount(minlength=32)
        imbalance.append((load_E.max() / load_E.double().mean()).item())
        bias_E = update_bias(bias_E, load_E, gamma=0.01)
    assert imbalance[0] > 2.5
    assert imbalance[-1] < 1.6
