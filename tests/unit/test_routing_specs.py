import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epcomm.routing import (
    count_destinations,
    list_profiles,
    make_routing,
    realised_load,
    uniform_routing,
)

SPECS = ["uniform", "gate", "skewed", "one-expert", "profile:prefill_in4096"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 20), st.integers(1, 4), st.integers(1, 6), st.data())
def test_every_spec_gives_distinct_ids_and_unit_weights(spec, num_tokens, groups, size, data):
    topk_groups = data.draw(st.integers(1, groups))
    num_experts, num_topk = groups * size, data.draw(st.integers(1, topk_groups * size))
    routing = make_routing(
        spec, num_tokens, num_experts, num_topk, num_groups=groups, topk_groups=topk_groups
    )
    idx_TK, weights_TK = routing.topk_idx_TK, routing.topk_weights_TK
    assert idx_TK.shape == weights_TK.shape == (num_tokens, num_topk)
    assert idx_TK.dtype == torch.int64
    assert weights_TK.dtype == torch.float32
    assert ((idx_TK >= -1) & (idx_TK < num_experts)).all()
    assert (weights_TK[idx_TK < 0] == 0).all()
    assert (weights_TK >= 0).all()
    torch.testing.assert_close(weights_TK.sum(dim=1), torch.ones(num_tokens))
    for row in idx_TK.tolist():
        used = [e for e in row if e >= 0]
        assert len(set(used)) == len(used) == (1 if spec == "one-expert" else num_topk)
        if spec != "uniform":
            assert len({e // size for e in used}) <= topk_groups


@pytest.mark.parametrize("spec", ["uniform", "gate", "skewed", "profile:decode_in2000out100"])
def test_seed_decides(spec):
    def ids(seed):
        return make_routing(spec, 50, 256, 8, seed=seed, num_groups=8, topk_groups=4).topk_idx_TK

    assert torch.equal(ids(1), ids(1))
    assert not torch.equal(ids(1), ids(2))


@pytest.mark.parametrize("spec", ["skewed", "profile:prefill_in4096"])
def test_ranks_agree_on_the_hot_experts(spec):
    load = [
        realised_load(make_routing(spec, 4096, 256, 8, seed=seed).topk_idx_TK, 256)
        for seed in (1, 2)
    ]
    assert load[0].argmax() == load[1].argmax()
    assert np.corrcoef(load)[0, 1] > 0.98
    other = make_routing(spec, 4096, 256, 8, seed=1, placement_seed=5)
    assert np.corrcoef(load[0], realised_load(other.topk_idx_TK, 256))[0, 1] < 0.5


def test_uniform_is_uniform():
    routing = uniform_routing(40000, 16, 4, np.random.default_rng(0))
    # 10000 +- 87 selections per expert; 5 sigma over 16 experts.
    count_E = routing.topk_idx_TK.flatten().bincount(minlength=16)
    assert (count_E - 10000).abs().max() < 450
    # First slots too: the order carries no information.
    first_E = routing.topk_idx_TK[:, 0].bincount(minlength=16)
    assert (first_E - 2500).abs().max() < 250
    # Pairs: P(0 and 1) = K(K-1) / (E(E-1)) = 0.05.
    both = ((routing.topk_idx_TK == 0).any(1) & (routing.topk_idx_TK == 1).any(1)).sum().item()
    assert abs(both - 2000) < 220


def test_one_expert_sends_all_tokens_to_one():
    routing = make_routing("one-expert:5", 3, 8, 2)
    assert routing.topk_idx_TK.tolist() == [[5, -1]] * 3
    assert routing.topk_weights_TK.tolist() == [[1.0, 0.0]] * 3


def test_skewed_is_skewed():
    load_E = realised_load(make_routing("skewed", 4096, 256, 8).topk_idx_TK, 256)
    # E/K = 32 is the most an expert can have, the uniform routing stays below 1.5.
    assert 20 < load_E.max() <= 32


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("", "routing spec"),
        ("unicorn", "unicorn"),
        ("uniform:3", "routing spec"),
        ("one-expert:x", "routing spec"),
        ("one-expert:", "routing spec"),
        ("one-expert:8", "num_experts=8"),
        ("profile:", "routing spec"),
        ("profile:none", list_profiles()[0]),
        ("trace:", "routing spec"),
    ],
)
def test_bad_specs_are_refused(spec, named):
    with pytest.raises(ValueError, match=named):
        make_routing(spec, 4, 8, 2)


@pytest.mark.parametrize(("sizes", "named"), [((-1, 8, 2), "num_tokens"), ((4, 8, 9), "num_topk")])
def test_bad_sizes_are_refused(sizes, named):
    with pytest.raises(ValueError, match=named):
        make_routing("uniform", *sizes)


@pytest.mark.parametrize(
    ("spec", "ranks", "nodes"),
    # Monte-Carlo values for E=256, K=8, 8 nodes of 8 ranks and random scores. Without a limit
    # they follow from sampling without replacement: 8 (1 - C(224,8)/C(256,8)) = 5.31 nodes,
    # 64 (1 - C(252,8)/C(256,8)) = 7.67 ranks.
    [("uniform", 7.67, 5.31), ("gate", 7.49, 3.97)],
)
def test_destination_counts_of_deepseek_sizes(spec, ranks, nodes):
    routing = make_routing(spec, 8192, 256, 8, num_groups=8, topk_groups=4)
    seen = count_destinations(routing.topk_idx_TK, 256, 64, 8)
    # The standard error is below 0.011 (nodes, uniform; deviation 0.9), 3 sigma allowed.
    assert seen.ranks_per_token == pytest.approx(ranks, abs=0.03)
    assert seen.nodes_per_token == pytest.approx(nodes, abs=0.03)


def test_gate_without_limit_goes_where_uniform_goes():
    seen = count_destinations(make_routing("gate", 8192, 256, 8).topk_idx_TK, 256, 64, 8)
    assert seen.nodes_per_token == pytest.approx(5.31, abs=0.03)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 6), st.integers(0, 99)
)
def test_count_destinations_is_the_loop_version(nodes, per_node, experts_per_rank, tokens, seed):
    num_ranks = nodes * per_node
    num_experts = num_ranks * experts_per_rank
    ids = np.random.default_rng(seed).integers(-1, num_experts, (tokens, 3))
    seen = count_destinations(torch.from_numpy(ids), num_experts, num_ranks, per_node)
    ranks = [{e // experts_per_rank for e in row if e >= 0} for row in ids.tolist()]
    node_sets = [{r // per_node for r in row} for row in ranks]
    assert seen.ranks_per_token == pytest.approx(sum(map(len, ranks)) / max(tokens, 1))
    assert seen.nodes_per_token == pytest.approx(sum(map(len, node_sets)) / max(tokens, 1))


def test_count_destinations_refuses():
    ids = torch.tensor([[0, 8]])
    with pytest.raises(ValueError, match=r"-1\.\.7"):
        count_destinations(ids, 8, 4, 2)
    with pytest.raises(ValueError, match="num_ranks"):
        count_destinations(ids, 8, 3, 1)
    with pytest.raises(ValueError, match="ranks_per_node"):
        count_destinations(ids, 8, 4, 3)
