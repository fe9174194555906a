"""Dispatch and combine equal the oracle, byte for byte, in every node shape of the world."""

from dataclasses import replace

import pytest
from harness import Case, check, nodes_of
from oracle_cases import CASES


@pytest.mark.parametrize("name", CASES)
def test_equals_oracle(comm, name):
    for ranks_per_node in nodes_of(comm.size):
        check(comm, replace(CASES[name], ranks_per_node=ranks_per_node))


def test_top_k_equals_all_experts(comm):
    experts_per_rank = 2
    for ranks_per_node in nodes_of(comm.size):
        num_topk = experts_per_rank * comm.size
        check(comm, Case(ranks_per_node, experts_per_rank=experts_per_rank, num_topk=num_topk))
