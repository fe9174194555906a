"""The combine kernels inside a node, run on the host, equal the oracle byte for byte."""

from dataclasses import replace

import numpy as np
import pytest
from cases import array_of, formats_of
from harness import Case, expect
from oracle_cases import CASES
from test_one_node import RANKS, make_node, queue

from epcomm import oracle

pytestmark = pytest.mark.timeout(120)


def check(node, case, seed=0):
    """A dispatch, then two combines along its routes without a pause between."""
    expected = expect(case, len(node.ranks))
    wanted = expected.combined
    routes = queue(node, case, expected.inputs)
    node.run(seed)
    got = []
    for _ in range(2):
        for rank, route, out in zip(node.ranks, routes, expected.outputs, strict=True):
            got.append(
                rank.combine(
                    route,
                    oracle.to_bytes(out.y),
                    formats_of(replace(case, packed=None))[0],
                    weights=array_of(out.weights),
                    topk_weights=array_of(out.topk_weights),
                    bias=[oracle.to_bytes(b) for b in out.bias],
                )
            )
    node.run(seed + 1)
    for (sums, weights), (want, want_weights) in zip(got, [*wanted, *wanted], strict=True):
        np.testing.assert_array_equal(sums, oracle.to_bytes(want))
        if want_weights is not None:
            np.testing.assert_array_equal(weights, want_weights)
    assert not any(rank.report["failed"] for rank in node.ranks)


@pytest.mark.parametrize("name", CASES)
def test_equals_oracle(one_node, name):
    case = replace(CASES[name], ranks_per_node=RANKS)
    check(make_node(one_node, case), case)


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("num_topk", range(1, 13))
def test_every_number_of_copies(one_node, layout, num_topk):
    # More than 8 have no room in shared memory; in layout "expert" every choice is one.
    case = Case(RANKS, layout=layout, num_topk=num_topk, experts_per_rank=7, tokens=(11, 3))
    check(make_node(one_node, case), case)


@pytest.mark.parametrize("extras", [{}, {"row_weights": True}, {"num_bias": 1}, {"num_bias": 2}])
@pytest.mark.parametrize("hidden", [8, 248, 256, 264, 520, 1032])
def test_columns_of_every_length(one_node, hidden, extras):
    # As many columns as are under way at once, fewer, and more; whole ones and not.
    case = Case(RANKS, hidden=hidden, tokens=(9, 0, 4), **extras)
    check(make_node(one_node, case), case)


@pytest.mark.parametrize(("blocks", "warps"), [(1, 1), (3, 1), (1, 5)])
def test_shares_of_warps_do_not_matter(one_node, blocks, warps):
    case = replace(CASES["skewed"], ranks_per_node=RANKS, routing="sparse", hidden=776)
    check(make_node(one_node, case, blocks=blocks, warps=warps, layout_warps=1), case)
