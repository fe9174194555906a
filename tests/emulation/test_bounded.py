"""Staging that holds few chunks: every schedule ends, and equals the oracle byte for byte.

As test_two_hop.py. A rank that waits for a credit may be what another waits for, so what is tested
here is above all that everybody goes on.
"""

from dataclasses import replace

import pytest
import torch
from cases import check_case, config_of, queue_dispatch
from fabrics import HARMLESS, Nics, Proxies
from harness import draw_inputs
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from oracle_cases import CASES
from test_two_hop import over_both
from world import EmulatedWorld

from epcomm.cuda.rail import largest_record
from epcomm.native import align, constants

#: (W, C): chunks of a peer that staging holds, records of a chunk.
SIZES = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (3, 1), (3, 2), (3, 4)]
sizes = pytest.mark.parametrize("size", SIZES)


def make_world(emulated, ranks_per_node, num_ranks, config, size, **options):
    """A world with staging for so many chunks of so many records of each peer."""
    held, records = size
    peers = num_ranks // ranks_per_node - 1
    each = align(held * records * largest_record(config), constants["limit_window_align"])
    config = replace(config, max_staging_bytes=2 * peers * each)
    world = EmulatedWorld(
        emulated, ranks_per_node, num_ranks, config, chunk_records=records, **options
    )
    plan = world.ranks[0].plan
    if plan.bounded:
        assert plan.staging_bytes == config.max_staging_bytes
        assert (plan.held_chunks, plan.chunking["chunk_records"]) == size
    return world


@pytest.mark.timeout(120)
@over_both
@pytest.mark.parametrize(
    ("name", "size"), [(name, SIZES[i % len(SIZES)]) for i, name in enumerate(CASES)]
)
def test_equals_oracle(emulated, name, size, fabric):
    case = replace(CASES[name], ranks_per_node=2)
    world = make_world(emulated, 2, 4, config_of(case, 4), size, fabric=fabric())
    check_case(world, case)


@pytest.mark.timeout(120)
@over_both
@sizes
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_every_size_of_staging(emulated, size, layout, fabric):
    case = replace(
        CASES["different token counts"], ranks_per_node=2, layout=layout, routing="skewed",
        tokens=(31, 0, 9, 24), num_topk=4,
    )  # fmt: skip
    world = make_world(emulated, 2, 4, config_of(case, 4), size, fabric=fabric())
    assert world.ranks[0].plan.bounded
    check_case(world, case, seed=sum(size))


@pytest.mark.timeout(120)
@over_both
@pytest.mark.parametrize(
    ("ranks_per_node", "num_ranks", "size"),
    [(1, 2, (2, 1)), (1, 4, (1, 1)), (3, 6, (1, 2)), (2, 6, (3, 1)), (1, 6, (1, 2))],
)
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_every_shape_of_world(emulated, ranks_per_node, num_ranks, size, layout, fabric):
    case = replace(
        CASES["different token counts"], ranks_per_node=ranks_per_node, layout=layout, alignment=1,
        tokens=(13, 0, 7, 2), num_bias=1, row_weights=True,
    )  # fmt: skip
    world = make_world(
        emulated, ranks_per_node, num_ranks, config_of(case, num_ranks), size, fabric=fabric()
    )
    check_case(world, case)


@pytest.mark.timeout(120)
@over_both
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("warps", [2, 5, 9])
def test_any_number_of_warps(emulated, warps, blocks, fabric):
    # Fewer warps that send than peers, as many, and more.
    case = replace(CASES["bf16"], ranks_per_node=1, tokens=(19, 3), num_topk=4)
    world = make_world(emulated, 1, 4, config_of(case, 4), (2, 1), blocks=blocks, fabric=fabric())
    check_case(world, case, warps=warps, seed=warps)


@pytest.mark.timeout(120)
@over_both
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 2)])
def test_many_calls_of_changing_sizes(emulated, size, fabric):
    # Places and counters are used again by calls with more, fewer and no laps.
    case = replace(CASES["bf16"], ranks_per_node=2, tokens=(40,), num_topk=4)
    world = make_world(emulated, 2, 4, config_of(case, 4), size, fabric=fabric())
    for i in range(6):
        tokens = tuple((7 * i + 13 * r * (i % 3)) % 41 for r in range(4))
        routing = ("uniform", "skewed", "one rank", "sparse")[i % 4]
        one = replace(case, tokens=tokens, routing=routing, seed=i)
        if i % 2:
            one = replace(one, layout="expert", alignment=2)
        check_case(world, one, seed=i)


def choices_of_nodes(tokens, nodes):
    """Top-k ids of one choice: token t goes to node ``nodes[t]``; one rank a node, two experts."""
    return torch.tensor(
        [[2 * node + t % 2] for t, node in enumerate(nodes)] + [[-1]] * (tokens - len(nodes))
    )


@pytest.mark.timeout(120)
@over_both
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1)])
def test_homes_that_need_the_same_peers_in_opposite_order(emulated, size, fabric):
    # Rank 0 needs its records of rank 2 before the first of rank 3, rank 1 the other way round. So
    # rank 2 must go on sending to 0 while 1 has no place for it, and so must 3 to 1.
    first, then = 24, 8
    case = replace(CASES["bf16"], ranks_per_node=1, experts_per_rank=2, num_topk=1, tokens=(32,))
    inputs = draw_inputs(case, 4)
    inputs[0].topk_idx[:] = choices_of_nodes(32, [2] * first + [3] * then)
    inputs[1].topk_idx[:] = choices_of_nodes(32, [3] * first + [2] * then)
    inputs[2].topk_idx[:] = -1
    inputs[3].topk_idx[:] = -1
    world = make_world(
        emulated, 1, 4, config_of(case, 4), size, fabric=fabric(), blocks=1, timeout=20.0
    )
    check_case(world, case, inputs=inputs)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(2))
def test_misbehaving_nics_are_not_noticed(emulated, seed):
    nics = Nics(planes=2, rules=HARMLESS, seed=seed, shuffle=True, blocks=8)
    case = replace(CASES["different token counts"], ranks_per_node=2, seed=seed)
    world = make_world(emulated, 2, 4, config_of(case, 4), (2, 1), fabric=nics, blocks=3)
    check_case(world, case, seed=seed)
    assert nics.count_faults() > 20


@pytest.mark.timeout(120)
@over_both
def test_lost_credit_is_named_after_who_owes_it(emulated, fabric):
    # Rank 0 has nothing to send but credits, and only its announcement arrives.
    case = replace(CASES["bf16"], ranks_per_node=2, tokens=(0, 0, 30, 0))
    world = make_world(
        emulated, 2, 4, config_of(case, 4), (1, 1), timeout=1.0, fabric=fabric(silent={0: 1})
    )
    queue_dispatch(world, case)
    world.run()
    for rank in world.ranks[2:]:
        assert rank.report["failed"]
        assert rank.error["rank"] == 0
        assert rank.error["phase"] == constants["PHASE_DATA"]
        # Warps wait for credits of different laps, and any may be the first to give up.
        assert rank.error["seen"] == 0 < rank.error["expected"]


@pytest.mark.timeout(600)
def test_any_case_equals_the_oracle(emulated):
    @settings(
        deadline=None, derandomize=True, database=None, max_examples=25,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def run(data: st.DataObject) -> None:
        per_node, nodes = data.draw(st.sampled_from([(1, 2), (1, 3), (2, 2), (1, 5), (2, 3)]))
        ranks = per_node * nodes
        layout = data.draw(st.sampled_from(["rank", "expert"]))
        case = replace(
            CASES["bf16"],
            ranks_per_node=per_node,
            hidden=data.draw(st.sampled_from([16, 80])),
            experts_per_rank=2,
            num_topk=data.draw(st.integers(1, min(2 * ranks, 5))),
            tokens=tuple(data.draw(st.lists(st.integers(0, 24), min_size=1, max_size=ranks))),
            routing=data.draw(st.sampled_from(["uniform", "skewed", "one rank", "sparse"])),
            layout=layout,
            seed=data.draw(st.integers(0, 2**16)),
        )
        size = data.draw(st.sampled_from(SIZES))
        blocks, warps = data.draw(st.sampled_from([(1, 2), (1, 4), (2, 2), (2, 3)]))
        fabric = data.draw(st.sampled_from([Proxies, Nics]))
        note(f"{case} {size} {blocks} blocks of {warps} warps {fabric}")
        config = config_of(case, ranks)
        world = make_world(
            emulated, per_node, ranks, config, size, blocks=blocks, fabric=fabric(), timeout=60.0
        )
        for seed in range(2):
            check_case(world, case, warps=warps, seed=seed)

    run()
