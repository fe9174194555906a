"""The kernels of the two-hop path, run on the host, equal the oracle byte for byte.

Over emulated proxies, which deliver chunks late and in any order, and over emulated NICs, to which
the kernels post by themselves. Ranks drift by a call.
"""

from dataclasses import replace

import pytest
import torch
from cases import UNEQUAL, check_case, config_of, queue_dispatch
from fabrics import Nics, Proxies
from harness import draw_inputs
from oracle_cases import CASES
from world import EmulatedWorld

from epcomm.native import constants

over_both = pytest.mark.parametrize("fabric", [Proxies, Nics])


@pytest.mark.timeout(120)
@over_both
@pytest.mark.parametrize("name", CASES)
def test_equals_oracle(emulated, name, fabric):
    case = replace(CASES[name], ranks_per_node=2)
    check_case(EmulatedWorld(emulated, 2, 4, config_of(case, 4), fabric=fabric()), case)


@pytest.mark.timeout(120)
@over_both
@pytest.mark.parametrize(("ranks_per_node", "num_ranks"), [(1, 2), (1, 4), (3, 6), (2, 6), (2, 10)])
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_every_shape_of_world(emulated, ranks_per_node, num_ranks, layout, fabric):
    case = replace(
        CASES["different token counts"], ranks_per_node=ranks_per_node, layout=layout, alignment=1,
        tokens=(13, 0, 7, 2), num_bias=1, row_weights=True,
    )  # fmt: skip
    config = config_of(case, num_ranks)
    world = EmulatedWorld(emulated, ranks_per_node, num_ranks, config, fabric=fabric())
    check_case(world, case)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("given", [{"packed": "f32"}, {"quantize": "fp8"}])
def test_rows_with_more_scales_than_a_warp_holds(emulated, given):
    # 65 words: two a lane, and one behind them.
    case = replace(CASES["bf16"], ranks_per_node=2, hidden=65 * 128, tokens=(5, 3), **given)
    check_case(EmulatedWorld(emulated, 2, 4, config_of(case, 4)), case)


@pytest.mark.timeout(120)
@over_both
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_as_many_near_copies_as_a_record_leaves(emulated, layout, fabric):
    # Rows go along with a record, which is one more place for them: 31 choices here and one there.
    case = replace(
        CASES["bf16"], ranks_per_node=1, layout=layout, alignment=1, quantize="fp8", num_topk=32,
        experts_per_rank=40, tokens=(9, 14),
    )  # fmt: skip
    inputs = draw_inputs(case, 2)
    for rank, mine in enumerate(inputs):
        here = torch.arange(31) + 40 * rank
        there = torch.arange(len(mine.topk_idx)) + 40 * (1 - rank)
        mine.topk_idx[:, :31], mine.topk_idx[:, 31] = here, there
    world = EmulatedWorld(emulated, 1, 2, config_of(case, 2), chunk_records=4, fabric=fabric())
    check_case(world, case, inputs=inputs)


@pytest.mark.timeout(120)
@over_both
@pytest.mark.parametrize("wire", ["f32", "bf16", "logfmt8", "logfmt10"])
def test_nodes_are_added_in_their_order(emulated, wire, fabric):
    # In float32 and over four nodes another order of additions shows.
    case = replace(
        CASES["f32"], ranks_per_node=1, experts_per_rank=2, num_topk=6, tokens=(9, 5), wire=wire
    )
    check_case(EmulatedWorld(emulated, 1, 4, config_of(case, 4), fabric=fabric()), case)


@pytest.mark.timeout(120)
@over_both
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_many_chunks_in_any_order(emulated, layout, seed, fabric):
    # Chunks of one record, more blocks than cores of which two place, ranks of one token and many.
    case = replace(
        CASES["bf16"], ranks_per_node=2, layout=layout, tokens=(31, 1), seed=seed, num_topk=4
    )
    world = EmulatedWorld(
        emulated, 2, 4, config_of(case, 4), chunk_records=1, blocks=3, fabric=fabric()
    )
    check_case(world, case, seed=seed)


@pytest.mark.timeout(120)
@over_both
@pytest.mark.parametrize("quantize", [None, "fp8"])
@pytest.mark.parametrize(("layout", "num_topk"), [("rank", 3), ("expert", 8), ("rank", 12)])
def test_rows_dealt_several_at_once(emulated, layout, num_topk, quantize, fabric):
    # Only where a warp has many are they: 4 of up to 8 choices, 2 of up to 16.
    case = replace(
        CASES["different token counts"], ranks_per_node=2, layout=layout, alignment=1,
        num_topk=num_topk, experts_per_rank=4, tokens=(90, 0, 61, 27), quantize=quantize,
    )  # fmt: skip
    world = EmulatedWorld(
        emulated, 2, 4, config_of(case, 4), chunk_records=8, blocks=1, fabric=fabric()
    )
    check_case(world, case, warps=1)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_counts_of_many_warps_are_scanned(emulated, layout):
    # More warps a block than counts are loaded together, all of them with tokens.
    case = replace(CASES["bf16"], ranks_per_node=1, layout=layout, tokens=(200, 190))
    check_case(EmulatedWorld(emulated, 1, 2, config_of(case, 2), chunk_records=64), case, warps=9)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(8))
def test_next_announcement_is_under_way_with_the_last(emulated, seed):
    # A rank that gets no records of a peer ends its call without hearing what reached that peer.
    case = replace(CASES["bf16"], ranks_per_node=1, tokens=(13, 0))
    world = EmulatedWorld(emulated, 1, 2, config_of(case, 2), timeout=20, fabric=Proxies(late=0.03))
    check_case(world, case, seed=seed)


@pytest.mark.timeout(120)
@over_both
def test_silent_rank_is_named_on_both_nodes(emulated, fabric):
    case = replace(CASES["bf16"], ranks_per_node=2)
    world = EmulatedWorld(emulated, 2, 4, config_of(case, 4), timeout=1.0, fabric=fabric())
    queue_dispatch(world, case)
    silent = world.ranks[3]
    silent.queue = []
    world.run()
    for rank in world.ranks[:3]:
        assert rank.report["failed"]
        assert rank.error["rank"] == 3
        assert rank.error["phase"] == constants["PHASE_ANNOUNCE"]


@pytest.mark.timeout(120)
@over_both
def test_lost_chunk_is_named_after_its_source(emulated, fabric):
    case = replace(CASES["bf16"], ranks_per_node=2)
    silent = fabric(silent={0: 1})  # its announcement arrives, and nothing else
    world = EmulatedWorld(emulated, 2, 4, config_of(case, 4), timeout=1.0, fabric=silent)
    queue_dispatch(world, case)
    world.run()
    for rank in world.ranks[2:]:
        assert rank.report["failed"]
        assert rank.error["rank"] == 0
        assert rank.error["phase"] == constants["PHASE_DATA"]


@pytest.mark.timeout(120)
@over_both
@pytest.mark.parametrize("refusing", [0, 3])
def test_what_was_written_ahead_of_a_refusal_is_dropped(emulated, fabric, refusing):
    case = replace(UNEQUAL, tokens=(31, 9, 0, 24))
    world = EmulatedWorld(emulated, 2, 4, config_of(case, 4), chunk_records=8, fabric=fabric())
    assert all(rank.plan.chunking["ahead_records"] == 8 for rank in world.ranks)
    check_case(world, case, refusing=refusing)


@pytest.mark.timeout(120)
@over_both
def test_refused_and_disagreeing_calls_move_nothing(emulated, fabric):
    case = replace(CASES["bf16"], ranks_per_node=2)
    world = EmulatedWorld(emulated, 2, 4, config_of(case, 4), fabric=fabric())
    inputs = queue_dispatch(world, case, refusing=2)
    world.run(1)
    for rank in world.ranks:
        assert not rank.report["failed"]
        assert rank.report["refusals"] == 1
        assert not any(window.any() for window in rank.windows)
    topk_idx = inputs[1].topk_idx.numpy()
    topk_idx[3, 1] = topk_idx[3, 0] = 5
    queue_dispatch(world, case, inputs=inputs)
    world.run(2)
    for rank in world.ranks:
        assert rank.report["refused_verdict"]
        assert int(rank.report["bad_choice"]) == (
            3 * case.num_topk + 1 if rank is world.ranks[1] else -1
        )
    check_case(world, case, seed=3)
