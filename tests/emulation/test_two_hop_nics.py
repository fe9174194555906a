"""The two-hop kernels over emulated NICs that misbehave, break, and count near a wrap."""

from dataclasses import replace

import pytest
from cases import UNEQUAL, check_case, config_of, queue_dispatch
from fabrics import HARMLESS, Nics, Rule
from oracle_cases import CASES
from world import EmulatedWorld

from epcomm.fabric.abi import constants as fabric_constants


@pytest.mark.timeout(120)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_harmless_faults_are_not_noticed(emulated, planes, seed):
    nics = Nics(planes=planes, rules=HARMLESS, seed=seed, shuffle=True)
    case = replace(UNEQUAL, layout=("rank", "expert")[seed % 2], seed=seed)
    check_case(EmulatedWorld(emulated, 2, 4, config_of(case, 4), fabric=nics), case, seed=seed)
    assert nics.count_faults() > 20


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", [rule.fault for rule in HARMLESS])
def test_a_fault_of_every_request_is_not_noticed(emulated, fault):
    nics = Nics(rules=[Rule(fault, seconds=2e-3)], blocks=16)
    case = replace(CASES["fp8"], ranks_per_node=2)
    check_case(EmulatedWorld(emulated, 2, 4, config_of(case, 4), fabric=nics), case)
    assert nics.count_faults() > 20


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_planes_of_several_peers(emulated, ranks_per_node):
    case = replace(UNEQUAL, ranks_per_node=ranks_per_node, tokens=(13, 0, 7, 2))
    size = 3 * ranks_per_node
    world = EmulatedWorld(
        emulated, ranks_per_node, size, config_of(case, size), fabric=Nics(planes=2)
    )
    check_case(world, case)


@pytest.mark.timeout(60)
def test_records_written_ahead_leave_those_under_way_alone(emulated):
    # Rank 0's records of the first combine are read late, when it is in the next dispatch. Before
    # them it has sent two announcements and the records of a dispatch, two requests each.
    case = replace(CASES["fp8"], ranks_per_node=1, tokens=(9, 9))
    nics = Nics(rules=[Rule("late fetch", 0, 1, 0, 6, 6, seconds=0.1, exact=True)])
    world = EmulatedWorld(emulated, 1, 2, config_of(case, 2), chunk_records=16, fabric=nics)
    assert all(rank.plan.chunking["ahead_records"] >= 9 for rank in world.ranks)
    check_case(world, case)
    assert nics.count_faults() == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("start", [65535, 65536 - 7, 2**32 - 5])
@pytest.mark.parametrize("blocks", [4, 16])
def test_counters_wrap_while_rings_are_full(emulated, start, blocks):
    # Several laps of the ring, writers that wait for room, and the 16 bits that the NIC sees.
    nics = Nics(start=start, blocks=blocks, rules=HARMLESS, seed=start % 11)
    world = EmulatedWorld(
        emulated, 2, 4, config_of(UNEQUAL, 4), chunk_records=1, blocks=3, fabric=nics
    )
    check_case(world, UNEQUAL, seed=blocks)


def run_two_dispatches(emulated, nics, **arguments):
    """A broken way may be noticed only when the next call waits for the other node."""
    case = replace(CASES["bf16"], ranks_per_node=2)
    world = EmulatedWorld(emulated, 2, 4, config_of(case, 4), timeout=1.0, fabric=nics, **arguments)
    for _ in range(2):
        queue_dispatch(world, case)
    world.run()
    return world


@pytest.mark.timeout(60)
@pytest.mark.parametrize("channel", [0, 1])
@pytest.mark.parametrize("fault", ["kill queue", "retry exceeded", "bad key"])
def test_broken_queue_pair_is_an_error_of_the_fabric(emulated, fault, channel):
    # After the announcement, which is the first two requests of channel 0.
    nics = Nics(rules=[Rule(fault, 0, 1, channel, 2 * (channel == 0), exact=True)])
    world = run_two_dispatches(emulated, nics)
    verdicts = world.constants
    sender = world.ranks[0]
    assert sender.error["verdict"] == verdicts["FABRIC"]
    assert sender.fabric_error["status"] == fabric_constants["TRANSPORT"]
    assert sender.fabric_error["peer"] == 1
    assert sender.fabric_error["channel"] == channel
    assert sender.fabric_error["vendor"]
    # The peer misses the chunk, or finds that the other end does not answer. The others' ways are
    # not broken: they hear of it in their node.
    assert all(rank.report["failed"] for rank in world.ranks)
    assert world.ranks[2].error["verdict"] in (verdicts["TIMEOUT"], verdicts["FABRIC"])
    assert world.ranks[2].error["rank"] == 0
    for rank in (world.ranks[1], world.ranks[3]):
        assert rank.fabric_error["status"] == 0


@pytest.mark.timeout(60)
def test_dead_nic_is_an_error_of_its_peer_and_ends_everybody(emulated):
    world = run_two_dispatches(emulated, Nics(dead=2))
    peer = world.ranks[0]
    assert peer.error["verdict"] == world.constants["FABRIC"]
    assert peer.error["rank"] == 2
    assert peer.fabric_error["peer"] == 1
    assert all(rank.report["failed"] for rank in world.ranks)
    # Its own requests vanish: it learns nothing but that nobody answers.
    assert world.ranks[2].fabric_error["status"] == 0


@pytest.mark.timeout(60)
def test_no_room_in_a_queue_is_an_error_at_the_deadline(emulated):
    # What rank 0 puts to the other node stays under way; its ring has room for two operations.
    nics = Nics(silent={0: 1}, blocks=4, timeout=0.5)
    world = run_two_dispatches(emulated, nics, chunk_records=1)
    sender = world.ranks[0]
    assert sender.error["verdict"] == world.constants["FABRIC"]
    assert sender.fabric_error["status"] == fabric_constants["RING_FULL"]
    assert sender.fabric_error["peer"] == 1
    assert all(rank.report["failed"] for rank in world.ranks)
