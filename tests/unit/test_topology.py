"""Nodes, local ranks and rails of regular, interleaved and impossible worlds."""

import numpy as np
import pytest

from epcomm.native import constants
from epcomm.topology import make_topology


def test_consecutive_ranks():
    topology = make_topology(4, ["a", "a", "a", "b", "b", "b"], None)
    assert (topology.num_ranks, topology.num_nodes, topology.ranks_per_node) == (6, 2, 3)
    assert (topology.node, topology.local_rank) == (1, 1)
    assert topology.node_ranks == [3, 4, 5]
    assert topology.rail == [1, 4]


def test_round_robin_placement():
    """Launchers that deal ranks out in turn: local ranks still pair up along rails."""
    topology = make_topology(3, ["a", "b", "c"] * 2, None)
    assert topology.node_of == (0, 1, 2, 0, 1, 2)
    np.testing.assert_array_equal(topology.rank_of_NL, [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(topology.local_of_R, [0, 0, 0, 1, 1, 1])
    assert topology.node_ranks == [0, 3]
    assert topology.rail == [3, 4, 5]


def test_mixed_order():
    """Nodes are numbered by their first rank, ranks within a node ascend."""
    hosts = ["z", "y", "y", "z", "x", "x"]
    topology = make_topology(0, hosts, None)
    assert topology.node_of == (0, 1, 1, 0, 2, 2)
    for rank in range(6):
        mine = make_topology(rank, hosts, None)
        assert mine.rank_of_NL[mine.node, mine.local_rank] == rank
        assert mine.rail[mine.node] == rank
        assert mine.node_ranks[mine.local_rank] == rank
        assert mine.node_of == topology.node_of


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
def test_virtual_nodes(size):
    for shape in range(1, size + 1):
        if size % shape == 0:
            topology = make_topology(size - 1, ["host"] * size, shape)
            assert topology.num_nodes == size // shape
            assert topology.ranks_per_node == shape
            assert topology.node_of == tuple(r // shape for r in range(size))


def test_virtual_nodes_inside_hosts():
    topology = make_topology(5, ["a"] * 4 + ["b"] * 4, 2)
    assert topology.node_of == (0, 0, 1, 1, 2, 2, 3, 3)
    assert topology.rail == [1, 3, 5, 7]


def test_unequal_nodes():
    with pytest.raises(ValueError, match=r"same number of ranks.*\{0: 2, 1: 1\}"):
        make_topology(0, ["a", "a", "b"], None)


def test_virtual_node_over_two_hosts():
    with pytest.raises(ValueError, match=r"ranks_per_node: node 0 would span hosts.*\[0, 1\]"):
        make_topology(0, ["a", "b", "a", "b"], 2)


@pytest.mark.parametrize(("size", "shape"), [(4, 3), (2, 4), (5, 2)])
def test_indivisible(size, shape):
    with pytest.raises(ValueError, match=f"ranks_per_node: {shape} does not divide the {size}"):
        make_topology(0, ["a"] * size, shape)


def test_limits():
    local = constants["limit_max_local_ranks"]
    assert make_topology(0, ["a"] * local, None).ranks_per_node == local
    with pytest.raises(ValueError, match=f"{local + 1} ranks exceed .* max_local_ranks={local}"):
        make_topology(0, ["a"] * (local + 1), None)
    ranks = constants["limit_max_ranks"]
    with pytest.raises(ValueError, match=f"max_ranks={ranks}"):
        make_topology(0, ["a"] * (ranks + 1), 1)
