"""Many calls of changing sizes, routings, layouts and formats on one buffer, each one checked."""

import torch
from expectations import HIDDEN, MAX_TOKENS
from stress import EXPERTS_PER_RANK, NUM_TOPK, Stress

import epcomm

CALLS = 201  # the last round is compared with the oracle as well


def test_every_call_is_right(comm):
    num_experts = EXPERTS_PER_RANK * comm.size
    with epcomm.Buffer(
        comm,
        hidden=HIDDEN,
        num_experts=num_experts,
        num_topk=min(NUM_TOPK, num_experts),
        max_tokens=MAX_TOKENS,
        ranks_per_node=comm.size,
        timeout=30.0,
    ) as buffer:
        Stress(comm, buffer, torch.device("cpu")).run(CALLS)
