"""The kernels of the two-hop path over planes of which one is slow or dies."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from cases import UNEQUAL, check_case, config_of, queue_dispatch
from fabrics import HARMLESS, Nics, Rule
from oracle_cases import CASES
from world import EmulatedWorld

from epcomm.fabric.abi import constants as fabric_constants

RETRIES, FLUSHED = 0x15, 0x05


def dead_plane(nics: Nics, plane: int, ranks: Iterable[int], fault: str, first: int) -> list[Rule]:
    """From request ``first`` of a queue pair on nothing of the plane's gets through."""
    channels = range(plane, nics.channels, nics.planes)
    return [Rule(fault, rank, -1, channel, first) for rank in ranks for channel in channels]


def losses_of(world):
    return [loss for rank in world.ranks for loss in rank.losses]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("planes", [2, 4])
def test_slow_plane_is_not_noticed(emulated, planes):
    nics = Nics(planes=planes, channels=4, failover=True)
    nics.rules = [Rule("delay", rank, -1, 1, seconds=3e-3, exact=True) for rank in range(4)]
    world = EmulatedWorld(emulated, 2, 4, config_of(UNEQUAL, 4), fabric=nics)
    check_case(world, UNEQUAL)
    assert nics.count_faults() > 20
    assert not losses_of(world)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["retry exceeded", "kill queue"])
@pytest.mark.parametrize("planes", [2, 4])
@pytest.mark.parametrize("first", [0, 1, 4, 11])
def test_plane_that_dies_is_not_noticed(emulated, planes, fault, first):
    nics = Nics(planes=planes, channels=4, failover=True, seed=first, shuffle=True, blocks=16)
    plane = first % planes
    nics.rules = [*HARMLESS, *dead_plane(nics, plane, range(4), fault, first)]
    world = EmulatedWorld(emulated, 2, 4, config_of(UNEQUAL, 4), chunk_records=1, fabric=nics)
    check_case(world, UNEQUAL, seed=first)
    losses = losses_of(world)
    assert losses
    assert all(loss["plane"] == plane for loss in losses)
    syndromes = {int(loss["vendor"]) >> 8 for loss in losses}
    assert syndromes <= ({RETRIES} if fault == "retry exceeded" else {RETRIES, FLUSHED})


@pytest.mark.timeout(120)
@pytest.mark.parametrize("first", [0, 3])
def test_planes_die_one_after_the_other(emulated, first):
    nics = Nics(planes=4, channels=4, failover=True, seed=first, blocks=16)
    for i, plane in enumerate((2, 0, 3)):
        nics.rules = [*nics.rules, *dead_plane(nics, plane, range(6), "kill queue", first + 3 * i)]
    case = replace(UNEQUAL, tokens=(13, 0, 7, 2))
    world = EmulatedWorld(emulated, 2, 6, config_of(case, 6), chunk_records=1, fabric=nics)
    check_case(world, case)
    assert {int(loss["plane"]) for loss in losses_of(world)} == {0, 2, 3}


@pytest.mark.timeout(300)
def test_any_one_request_may_be_the_last_of_its_queue_pair(emulated):
    # Also the last ones of a kernel: then nobody posts any more, and the peer waits.
    case = replace(CASES["bf16"], ranks_per_node=1)
    for request in range(1000):
        nics = Nics(planes=2, failover=True, seed=request)
        nics.rules = [
            Rule("late completion", chance=0.5, seconds=1e-3),
            Rule("kill queue", 0, -1, 1, request, request),
        ]
        world = EmulatedWorld(emulated, 1, 2, config_of(case, 2), timeout=10.0, fabric=nics)
        check_case(world, case)
        if not losses_of(world):
            break
    assert 4 < request < 100


@pytest.mark.timeout(120)
@pytest.mark.parametrize("failover", [False, True])
def test_dead_planes_are_an_error_that_names_the_first(emulated, failover):
    # With one plane left, nothing would fail; without failover the first one is enough.
    nics = Nics(planes=2, failover=failover, timeout=1.0)
    nics.rules = dead_plane(nics, 1, [0], "kill queue", 0)
    if failover:
        # In a later call than the loss, which a call does not end without dealing with.
        nics.rules += dead_plane(nics, 0, [0], "bad key", 16)
    case = replace(CASES["bf16"], ranks_per_node=1)
    world = EmulatedWorld(emulated, 1, 2, config_of(case, 2), timeout=2.0, fabric=nics)
    for _ in range(8):
        queue_dispatch(world, case)
    world.run()
    error = world.ranks[0].fabric_error
    assert world.ranks[0].error["verdict"] == world.constants["FABRIC"]
    assert error["status"] == fabric_constants["TRANSPORT"]
    assert error["peer"] == 1
    assert error["queue_pair"]
    assert len(world.ranks[0].losses) == failover
    if failover:  # What is wrong with a request is no plane's fault.
        assert error["channel"] == 0
        assert error["vendor"] >> 8 == 0x13
    else:
        assert error["channel"] == 1
        assert error["vendor"] >> 8 == FLUSHED
    assert all(rank.report["failed"] for rank in world.ranks)


@pytest.mark.timeout(120)
def test_no_plane_left_is_an_error_that_names_the_first(emulated):
    nics = Nics(planes=2, failover=True, timeout=1.0)
    nics.rules = dead_plane(nics, 1, [0], "kill queue", 0)
    nics.rules += dead_plane(nics, 0, [0], "retry exceeded", 6)
    case = replace(CASES["bf16"], ranks_per_node=1)
    world = EmulatedWorld(emulated, 1, 2, config_of(case, 2), timeout=2.0, fabric=nics)
    for _ in range(3):
        queue_dispatch(world, case)
    world.run()
    error, losses = world.ranks[0].fabric_error, world.ranks[0].losses
    assert {int(loss["plane"]) for loss in losses} == {0, 1}
    assert error["status"] == fabric_constants["TRANSPORT"]
    assert error["channel"] == losses[0]["channel"]
    assert error["vendor"] == losses[0]["vendor"]
    assert error["queue_pair"] == losses[0]["queue_pair"]
    assert all(rank.report["failed"] for rank in world.ranks)
