"""Who sits where: nodes, local ranks and rails."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .native import constants


@dataclass(frozen=True)
class Topology:
    """The world as every rank sees it.

    A *node* is a group of ranks that can load and store each other's memory. *Rail* l is the set
    of ranks with local rank l, one on every node; scale-out traffic travels only along a rail.

    Attributes:
        rank: this rank.
        node_of: node of every rank, int tuple of length R.
    """

    rank: int
    node_of: tuple[int, ...]

    @cached_property
    def num_ranks(self) -> int:
        return len(self.node_of)

    @cached_property
    def num_nodes(self) -> int:
        return max(self.node_of) + 1

    @cached_property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    @cached_property
    def rank_of_NL(self) -> np.ndarray:
        """Global rank of every (node, local rank), int32 [N, L]; ascending within a node."""
        order = np.argsort(self.node_of_R, kind="stable")
        return order.reshape(self.num_nodes, self.ranks_per_node).astype(np.int32)

    @cached_property
    def node_of_R(self) -> np.ndarray:
        """Node of every rank, int32 [R]: ``node_of`` for kernels."""
        return np.array(self.node_of, np.int32)

    @cached_property
    def local_of_R(self) -> np.ndarray:
        """Local rank of every rank, int32 [R]."""
        local = np.empty(self.num_ranks, np.int32)
        for ranks_L in self.rank_of_NL:
            local[ranks_L] = np.arange(self.ranks_per_node)
        return local

    @cached_property
    def node(self) -> int:
        return self.node_of[self.rank]

    @cached_property
    def local_rank(self) -> int:
        return int(self.local_of_R[self.rank])

    @cached_property
    def node_ranks(self) -> list[int]:
        """Ranks of this node, by local rank."""
        return [int(r) for r in self.rank_of_NL[self.node]]

    @cached_property
    def rail(self) -> list[int]:
        """Ranks of this rail, by node; includes this rank."""
        return [int(r) for r in self.rank_of_NL[:, self.local_rank]]


def make_topology(rank: int, hosts: Sequence[object], ranks_per_node: int | None) -> Topology:
    """Group ranks into nodes.

    Args:
        rank: this rank.
        hosts: for every rank something equal exactly for ranks that share memory.
        ranks_per_node: make virtual nodes of this many consecutive ranks; None: one node a host.

    Raises:
        ValueError: nodes of unequal size, a virtual node spanning hosts, or a limit exceeded.
    """
    num_ranks = len(hosts)
    if ranks_per_node is None:
        first_seen = {host: n for n, host in enumerate(dict.fromkeys(hosts))}
        node_of = tuple(first_seen[host] for host in hosts)
    else:
        if num_ranks % ranks_per_node:
            raise ValueError(
                f"ranks_per_node: {ranks_per_node} does not divide the {num_ranks} ranks"
            )
        node_of = tuple(r // ranks_per_node for r in range(num_ranks))
    members: dict[int, list[int]] = {}
    for r, node in enumerate(node_of):
        members.setdefault(node, []).append(r)
    sizes = sorted({len(ranks) for ranks in members.values()})
    if len(sizes) > 1:
        counts = {node: len(ranks) for node, ranks in members.items()}
        raise ValueError(
            f"every node must have the same number of ranks, but nodes have {counts}; "
            "rails pair ranks of equal local rank, so start the same number on each host"
        )
    for node, ranks in members.items():
        if len({hosts[r] for r in ranks}) > 1:
            raise ValueError(
                f"ranks_per_node: node {node} would span hosts: ranks {ranks} do not share memory"
            )
    for name, value in (("max_ranks", num_ranks), ("max_local_ranks", sizes[0])):
        if value > constants[f"limit_{name}"]:
            raise ValueError(f"{value} ranks exceed the limit {name}={constants[f'limit_{name}']}")
    return Topology(rank, node_of)
