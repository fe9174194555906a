"""A Buffer that cannot be made: every rank learns why."""

from typing import Any

import pytest
from harness import check
from refusals import CASE, expect, expect_mismatch

import epcomm

MAKE = {
    "hidden of 20": ({"hidden": 20}, ValueError, ("hidden: 20", "multiple of 8")),
    "hidden 0": ({"hidden": 0}, ValueError, ("hidden: 0", "1..")),
    "hidden a float": ({"hidden": 64.0}, TypeError, ("hidden:", "int", "float")),
    "num_experts a bool": ({"num_experts": True}, TypeError, ("num_experts:", "int", "bool")),
    "more choices than experts": ({"num_topk": 65}, ValueError, ("num_topk: 65", "num_experts=64")),
    "num_topk above the limit": ({"num_topk": 1000}, ValueError, ("num_topk: 1000", "1..256")),
    "max_tokens negative": ({"max_tokens": -1}, ValueError, ("max_tokens: -1", "0..")),
    "timeout 0": ({"timeout": 0}, ValueError, ("timeout:", "> 0", "got 0")),
    "timeout not a number": ({"timeout": float("nan")}, ValueError, ("timeout:", "nan")),
    "timeout endless": ({"timeout": float("inf")}, ValueError, ("timeout:", "inf")),
    "timeout no number": ({"timeout": "60"}, ValueError, ("timeout:", "'60'")),
    "unknown backend": ({"backend": "tpu"}, ValueError, ("backend:", "'tpu'", "cpu")),
    "num_threads 0": ({"num_threads": 0}, ValueError, ("num_threads:", "0")),
    "ranks_per_node 0": ({"ranks_per_node": 0}, ValueError, ("ranks_per_node:", "0")),
    "ranks_per_node too large": ({"ranks_per_node": 99}, ValueError, ("ranks_per_node: 99",)),
}


def sizes(comm: Any, **change: Any) -> dict[str, Any]:
    experts = 64 if 64 % comm.size == 0 else 60
    return {
        "hidden": 64, "num_experts": experts, "num_topk": 4, "max_tokens": 8, "timeout": 30.0
    } | change  # fmt: skip


@pytest.mark.parametrize("name", MAKE)
def test_construction_refuses(comm, name):
    change, kind, words = MAKE[name]
    if "num_experts=64" in words and comm.size in (3, 6):
        words = ("num_topk: 65",)
    bad_rank = list(MAKE).index(name) % comm.size
    given = sizes(comm, **change) if comm.rank == bad_rank else sizes(comm)
    expect(comm, bad_rank, lambda: epcomm.Buffer(comm, **given), kind, words)
    check(comm, CASE)


def test_experts_not_shared_equally(comm):
    if comm.size == 1:
        pytest.skip("one rank holds any number of experts")
    with pytest.raises(ValueError, match=rf"num_experts: {comm.size + 1} .* {comm.size} ranks"):
        epcomm.Buffer(comm, **sizes(comm, num_experts=comm.size + 1, num_topk=1))


@pytest.mark.parametrize("name", ["hidden", "num_experts", "num_topk", "max_tokens"])
def test_construction_arguments_differ(comm, name):
    if comm.size == 1:
        pytest.skip("one rank cannot disagree")
    for odd in range(comm.size):
        given = sizes(comm)
        if comm.rank == odd:
            given[name] *= 2
        expect_mismatch(comm, odd, lambda g=given: epcomm.Buffer(comm, **g), name)
    check(comm, CASE)


def test_group_of_wrong_type(comm):
    with pytest.raises(TypeError, match=r"group: expected an mpi4py communicator .* builtins\.int"):
        epcomm.Buffer(comm.rank, **sizes(comm))
