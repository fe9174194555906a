"""Many calls of changing sizes, routings, layouts and formats on one buffer, each one checked."""

import torch
from stress import Stress, make_stressed_buffer

CALLS = 201  # the last round is compared with the oracle as well


def test_every_call_is_right(comm):
    with make_stressed_buffer(comm) as buffer:
        Stress(comm, buffer, torch.device("cpu")).run(CALLS)
