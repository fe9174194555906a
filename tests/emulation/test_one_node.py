"""The dispatch kernels inside a node, run on the host, equal the oracle byte for byte."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import config_of, formats_of
from harness import Case, draw_inputs, make_world
from kernels import Kernels
from one_node import Node
from oracle_cases import CASES

from epcomm import oracle
from epcomm.native import constants

pytestmark = pytest.mark.timeout(120)
RANKS = 3


def make_node(one_node, case, num_ranks=RANKS, **options: Any) -> Node:
    return Node(one_node, num_ranks, config_of(case, num_ranks), **options)


def queue(node, case, inputs, routes=None, refusing=None):
    """A dispatch of every rank: first, or along ``routes``."""
    given, fmt = formats_of(case)
    made = []
    for rank, mine in zip(node.ranks, inputs, strict=True):
        x, scales = mine.x if isinstance(mine.x, tuple) else (mine.x, None)
        weights = None if mine.topk_weights is None else mine.topk_weights.numpy()
        made.append(
            rank.dispatch(
                oracle.to_bytes(x),
                given,
                fmt,
                mine.topk_idx.numpy(),
                weights,
                scales=None if scales is None else oracle.to_bytes(scales),
                by_expert=case.layout == "expert",
                alignment=case.alignment,
                fixed_rows=-1 if case.fixed_rows is None else case.fixed_rows,
                routes=None if routes is None else routes[rank.rank],
                status=int(rank.rank == refusing),
            )
        )
    return made


def compare(node, case, routes, received):
    for rank, mine, want in zip(node.ranks, routes, received, strict=True):
        assert not rank.report["failed"]
        assert int(mine.rows[rank.rank]) == want.num_rows
        got = rank.received(mine, -1 if case.fixed_rows is None else case.fixed_rows)
        np.testing.assert_array_equal(got["source"], want.source)
        np.testing.assert_array_equal(got["payload"], want.payload)
        np.testing.assert_array_equal(got["scales"], want.scales)
        for name in ("topk_idx", "topk_weights"):
            expected = getattr(want, name)
            if expected is not None:
                np.testing.assert_array_equal(got[name].reshape(expected.shape), expected)
        np.testing.assert_array_equal(rank.local_expert_rows, want.tokens_per_expert)
        np.testing.assert_array_equal(mine.group_count, want.tokens_per_expert)
        rows = [r.num_rows for r in received]
        np.testing.assert_array_equal(mine.rows, rows)
        assert (rank.report["rows"], rank.report["max_rows"]) == (want.num_rows, max(rows))
        free_bits = node.constants["FREE_BITS"]
        # Of the rank that has fewest.
        assert rank.report["free_windows"] == rank.number << free_bits | 3
        assert rank.report["prepared"] == rank.number


def check(node, case, seed=0):
    """A first dispatch, a cached one, and several without a pause between."""
    inputs = draw_inputs(case, len(node.ranks))
    received = oracle.dispatch(inputs, make_world(case, len(node.ranks)))
    first = queue(node, case, inputs)
    node.run(seed)
    compare(node, case, first, received)
    for rank in node.ranks:
        rank.window[:] = 7
    queue(node, case, inputs, routes=first)
    node.run(seed + 1)
    compare(node, case, first, received)
    queue(node, case, inputs, routes=first)
    again = queue(node, case, inputs)
    queue(node, case, inputs, routes=first)
    node.run(seed + 2)
    compare(node, case, first, received)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.dests, other.dests)


@pytest.mark.parametrize("name", CASES)
def test_equals_oracle(one_node, name):
    case = replace(CASES[name], ranks_per_node=RANKS)
    check(make_node(one_node, case), case)


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("num_topk", [1, 8, 9, 20])
def test_choices_loaded_at_a_time_do_not_matter(one_node, layout, num_topk):
    case = Case(RANKS, layout=layout, num_topk=num_topk, experts_per_rank=7, tokens=(40, 3))
    check(make_node(one_node, case), case)


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize(("blocks", "warps", "layout_warps"), [(1, 1, 1), (3, 2, 1), (2, 3, 3)])
def test_shares_of_warps_do_not_matter(one_node, layout, blocks, warps, layout_warps):
    # Several groups of 32 tokens for a warp, the last of them short.
    case = Case(RANKS, layout=layout, tokens=(330, 97, 64), hidden=16, alignment=1)
    node = make_node(one_node, case, blocks=blocks, warps=warps, layout_warps=layout_warps)
    check(node, case)


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("num_ranks", [1, 9, 34])
def test_every_number_of_ranks(one_node, layout, num_ranks):
    # More ranks than loads in flight, and more than lanes of a warp.
    case = Case(num_ranks, layout=layout, experts_per_rank=2, num_topk=2, tokens=(5, 0, 9),
                hidden=16)  # fmt: skip
    check(make_node(one_node, case, num_ranks, blocks=1, warps=1, layout_warps=1), case)


def test_many_experts_of_a_rank(one_node):
    case = Case(2, layout="expert", experts_per_rank=70, alignment=3, tokens=(50, 20), hidden=16)
    check(make_node(one_node, case, 2), case)


@pytest.mark.parametrize("seed", range(3))
def test_blocks_that_drift_apart_meet(one_node, seed):
    case = Case(2, tokens=(70, 1), num_topk=2, seed=seed, hidden=16)
    node = make_node(one_node, case, 2, blocks=5, warps=1, layout_warps=1)
    for rank in node.ranks:
        rank.world["delay_ns"] = 300_000
    check(node, case, seed)


@pytest.mark.parametrize("k", [1, 8, 11])
@pytest.mark.parametrize("value", ["twice", -2, 10**12])
def test_bad_ids_are_found_and_nothing_moves(one_node, k, value):
    case = Case(RANKS, num_topk=12, experts_per_rank=5)
    node = make_node(one_node, case)
    inputs = draw_inputs(case, RANKS)
    topk_idx = inputs[1].topk_idx.numpy()
    topk_idx[3] = torch.arange(12)
    topk_idx[3, k] = topk_idx[3, 0] if value == "twice" else value
    topk_idx[9, 0] = -7  # the first is told
    routes = queue(node, case, inputs)
    node.run()
    for rank, mine in zip(node.ranks, routes, strict=True):
        assert not rank.report["failed"]
        assert rank.report["verdict"] == node.constants["REFUSED"]
        bad = 3 * 12 + k if rank.rank == 1 else -1
        assert (rank.report["bad_choice"], rank.report["refused_choice"]) == (bad, bad)
        assert mine.verdict[0] == node.constants["REFUSED"]
        assert not rank.window.any()
    check(node, replace(case, num_topk=12))


@pytest.mark.parametrize(("refusing", "rows", "verdict", "later"), [
    (2, 200, "REFUSED", "STALE"),
    (None, 5, "FIXED_ROWS", "FIXED_ROWS"),
])  # fmt: skip
def test_refused_and_too_small_calls_move_nothing(one_node, refusing, rows, verdict, later):
    case = Case(RANKS, fixed_rows=rows, tokens=(17,))
    node = make_node(one_node, case)
    inputs = draw_inputs(case, RANKS)
    routes = queue(node, case, inputs, refusing=refusing)
    node.run()
    for rank, mine in zip(node.ranks, routes, strict=True):
        assert rank.report["verdict"] == mine.verdict[0] == node.constants[verdict]
        assert rank.report["refusals"] == 1
        assert not rank.window.any()
        rank.report["acknowledged"] = 1
    queue(node, case, inputs, routes=routes)
    node.run()
    for rank in node.ranks:
        assert rank.report["verdict"] == node.constants[later]
        assert not rank.window.any()
    check(node, replace(case, fixed_rows=200))


def test_silent_rank_is_named(one_node):
    case = Case(RANKS)
    node = make_node(one_node, case, timeout=1.0)
    queue(node, case, draw_inputs(case, RANKS))
    silent = node.ranks.pop()
    node.run()
    for rank in node.ranks:
        assert rank.report["failed"]
        error = rank.report["error"].view(node.dtypes["error"]).reshape(())
        assert error["rank"] == silent.rank
        assert error["phase"] == constants["PHASE_ANNOUNCE"]


def test_every_expert_is_found_on_its_rank(one_node):
    # By a multiplication, which rounds.
    most = Kernels(one_node).constants["MAX_EXPERTS"]
    wrong = {each: one_node.emulate_first_wrong_rank(each) for each in range(1, most + 1)}
    assert set(wrong.values()) == {-1}
