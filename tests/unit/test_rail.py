"""Numbering of records, chunks and signals between nodes, and the staging they take."""

import itertools

import numpy as np
import pytest

from epcomm import native
from epcomm.backend import Config
from epcomm.cpu.layout import make_layout
from epcomm.cuda import rail
from epcomm.fabric.fabric import RingMemory
from epcomm.formats.wire import WireFormat
from epcomm.native import align, constants, dispatch_record, dtypes, library
from epcomm.topology import make_topology

SHAPES = [(2, 1), (2, 4), (3, 2), (8, 1), (32, 8)]


def plan_of(nodes, per_node, node=0, *, max_tokens=100, chunk_records=8, hidden=64, cap=None):
    topology = make_topology(node * per_node, [0] * (nodes * per_node), per_node)
    config = Config(hidden, 8 * nodes * per_node, 4, max_tokens, max_staging_bytes=cap)
    return rail.plan_rail(topology, config, chunk_records=chunk_records), topology, config


def cap_for(nodes, records, hidden=64):
    """Bytes of staging that hold so many records of every peer."""
    record = rail.largest_record(Config(hidden, 8 * nodes, 4, 100))
    return 2 * (nodes - 1) * align(records * record, constants["limit_window_align"])


def find_slot(plan, peer, slot, record_bytes):
    place = np.zeros((), dtypes["slot_place"])
    library.epcomm_find_slot(plan.chunking.ctypes.data, peer, slot, record_bytes, place.ctypes.data)
    return place


def find_item(plan, item):
    place = np.zeros((), dtypes["item_place"])
    library.epcomm_find_item(plan.chunking.ctypes.data, item, place.ctypes.data)
    return place


@pytest.mark.parametrize(("nodes", "per_node"), SHAPES)
def test_every_signal_has_one_writer_and_no_slots_overlap(nodes, per_node):
    node = nodes - 1
    plan, _, config = plan_of(nodes, per_node, node)
    record = rail.largest_record(config)
    signals: dict[int, tuple[int, int]] = {}
    ends = []
    for peer in set(range(nodes)) - {node}:
        announce = int(find_slot(plan, peer, 0, record)["announce_signal"])
        assert signals.setdefault(announce, (peer, 0)) == (peer, 0)
        for slot in range(config.max_tokens):
            place = find_slot(plan, peer, slot, record)
            assert place["chunk"] == slot // 8
            writer = (peer, int(place["channel"]))
            assert signals.setdefault(int(place["signal"]), writer) == writer
            ends.append((int(place["offset"]), int(place["offset"]) + record))
    assert set(signals) == set(range(plan.num_signals))
    ends.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
    assert ends[-1][1] <= plan.region_bytes()[constants["REGION_SEND"]]


@pytest.mark.parametrize(("nodes", "per_node"), SHAPES)
@pytest.mark.parametrize(("held", "chunk"), [(1, 8), (3, 8), (4, 8), (9, 2), (1, 1)])
def test_places_of_bounded_staging_have_one_chunk_at_a_time(nodes, per_node, held, chunk):
    node = nodes - 1
    plan, _, config = plan_of(
        nodes, per_node, node, chunk_records=chunk, cap=cap_for(nodes, held * chunk)
    )
    if held < 4:  # rather shorter chunks
        chunk, held = max(1, min(chunk, 4)), held * chunk // min(chunk, 4)
    assert (plan.held_chunks, plan.chunking["chunk_records"]) == (held, chunk)
    assert plan.bounded
    record = rail.largest_record(config)
    signals: dict[int, tuple[int, int, str]] = {}
    offsets: dict[int, tuple[int, int]] = {}
    for peer in set(range(nodes)) - {node}:
        announce = int(find_slot(plan, peer, 0, record)["announce_signal"])
        assert signals.setdefault(announce, (peer, 0, "announcement"))[0] == peer
        for slot in range(config.max_tokens):
            place = find_slot(plan, peer, slot, record)
            assert divmod(int(place["chunk"]), held)[0] == place["lap"]
            for kind in ("signal", "credit_signal"):
                writer = (peer, int(place["channel"]), kind)
                assert signals.setdefault(int(place[kind]), writer) == writer
            # Only records that are whole laps apart share a slot.
            at = (peer, slot % (held * chunk))
            assert offsets.setdefault(int(place["offset"]), at) == at
    assert set(signals) == set(range(plan.num_signals))
    assert len(offsets) == (nodes - 1) * held * chunk
    assert all(b - a >= record for a, b in itertools.pairwise(sorted(offsets)))
    assert max(offsets) + record <= plan.region_bytes()[constants["REGION_SEND"]]
    assert {np.prod(shape) for shape, _ in plan.state_shapes().values()} <= {
        2,
        (nodes - 1) * held,
    }


@pytest.mark.parametrize("nodes", [2, 3, 32])
@pytest.mark.parametrize("wanted", [1, 4, 6, 64, 256])
def test_staging_never_exceeds_its_bound_and_uses_it(nodes, wanted):
    for records in [*range(4, 40), 64, 77, 99]:
        for spare in (0, 100 * (nodes - 1)):
            cap = cap_for(nodes, records) + spare
            plan, _, _ = plan_of(nodes, 1, chunk_records=wanted, cap=cap)
            length = int(plan.chunking["chunk_records"])
            assert plan.bounded
            assert plan.staging_bytes <= cap
            assert plan.held_chunks * length > records - length
            # Short chunks where there would be few of them, and no shorter than need be.
            assert length <= wanted
            assert plan.held_chunks >= 4 or length <= 4
            assert length == wanted or length == 4 or records // (2 * length) < 4
            signals = (nodes - 1) * (1 + 2 * plan.held_chunks)
            assert plan.region_bytes()[0] == 8 * (signals + 1)
    roomy, _, _ = plan_of(nodes, 1, chunk_records=wanted, cap=cap_for(nodes, 100))
    assert not roomy.bounded
    ahead = cap_for(nodes, min(wanted, 100))
    roomier, _, _ = plan_of(nodes, 1, chunk_records=wanted, cap=cap_for(nodes, 100) + ahead)
    assert roomier.region_bytes() == plan_of(nodes, 1, chunk_records=wanted)[0].region_bytes()


@pytest.mark.parametrize("nodes", [2, 3, 256])
def test_bound_below_the_shortest_chunk_is_refused_with_what_is_needed(nodes):
    needed = cap_for(nodes, 4)
    for cap in (1, needed // 2, needed - 1):
        with pytest.raises(ValueError, match="max_staging_bytes") as caught:
            plan_of(nodes, 1, chunk_records=64, cap=cap)
        text = str(caught.value)
        assert f"{cap} bytes" in text
        assert f"take {needed} bytes" in text
        assert f"each of {nodes - 1}" in text
    plan, _, _ = plan_of(nodes, 1, chunk_records=64, cap=needed)
    assert (plan.held_chunks, int(plan.chunking["chunk_records"])) == (1, 4)
    # With less than four records a call, all of them.
    with pytest.raises(ValueError, match="3 records"):
        plan_of(nodes, 1, max_tokens=3, chunk_records=64, cap=cap_for(nodes, 3) - 1)
    assert not plan_of(nodes, 1, max_tokens=3, chunk_records=64, cap=cap_for(nodes, 3))[0].bounded


@pytest.mark.parametrize("nodes", [2, 3, 32])
@pytest.mark.parametrize("max_tokens", [3, 100])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_records_written_ahead_have_two_places_of_their_own(nodes, max_tokens, share):
    plan, _, config = plan_of(nodes, 1, nodes - 1, max_tokens=max_tokens)
    ahead = int(plan.chunking["ahead_records"])
    assert ahead == min(8, max_tokens)
    # Of every size, as the next call's may be of another.
    record = align(int(share * rail.largest_record(config)), 16)
    behind = plan.num_peers * int(plan.chunking["peer_bytes"])
    starts: dict[int, tuple[int, int, int]] = {}
    for peer in range(nodes - 1):
        for slot in range(max_tokens):
            place = find_slot(plan, peer, slot, record)
            offsets = place["send_offset"].tolist()
            if slot >= ahead:
                assert offsets == [place["offset"]] * 2
                assert offsets[0] + record <= behind
                continue
            for parity, offset in enumerate(offsets):
                assert starts.setdefault(offset, (parity, peer, slot)) == (parity, peer, slot)
    assert len(starts) == 2 * (nodes - 1) * ahead
    assert all(b - a >= record for a, b in itertools.pairwise(sorted(starts)))
    assert min(starts) >= behind
    assert max(starts) + record <= plan.region_bytes()[constants["REGION_SEND"]]


def test_nothing_is_written_ahead_where_staging_has_no_room_for_it():
    exact, _, _ = plan_of(3, 1, cap=cap_for(3, 100))
    assert not exact.bounded
    assert exact.chunking["ahead_records"] == 0
    place = find_slot(exact, 1, 0, 64)
    assert place["send_offset"].tolist() == [place["offset"]] * 2
    roomy, _, _ = plan_of(3, 1, cap=cap_for(3, 100) + cap_for(3, 8))
    assert roomy.chunking["ahead_records"] == 8
    assert roomy.staging_bytes <= cap_for(3, 100) + cap_for(3, 8)
    bounded, _, _ = plan_of(3, 1, cap=cap_for(3, 40))
    assert bounded.chunking["ahead_records"] == 0


def test_bound_makes_room_for_256_nodes():
    with pytest.raises(ValueError, match="max_staging_bytes"):
        plan_of(256, 8, max_tokens=8192, hidden=7168, chunk_records=64)
    plan, _, _ = plan_of(256, 8, max_tokens=8192, hidden=7168, chunk_records=64, cap=2 << 30)
    assert plan.staging_bytes <= 2 << 30
    assert plan.num_signals <= 1 << 16


@pytest.mark.parametrize(("nodes", "per_node"), SHAPES)
@pytest.mark.parametrize("records", [0, 1, 8, 9, 100])
def test_items_are_every_slot_of_every_peer_once(nodes, per_node, records):
    plan, _, _ = plan_of(nodes, per_node, 1)
    count = library.epcomm_count_items(plan.chunking.ctypes.data, records)
    items = [find_item(plan, i) for i in range(count)]
    peers = set(range(nodes)) - {1}
    for side in ("send_node", "receive_node"):
        found = [(int(i[side]), int(i["slot"])) for i in items]
        assert len(set(found)) == len(found)
        assert {f for f in found if f[1] < records} == set(itertools.product(peers, range(records)))
        # A chunk of one peer comes whole, and chunks in their order.
        for peer in peers:
            slots = [slot for node, slot in found if node == peer]
            assert slots == sorted(slots)


def test_both_ends_agree_on_a_slot():
    # Rank a's slot for b is where b looks for what a sends.
    nodes = 5
    for a, b in itertools.permutations(range(nodes), 2):
        sender, _, config = plan_of(nodes, 2, a)
        receiver, _, _ = plan_of(nodes, 2, b)
        record = rail.largest_record(config)
        at_b = find_slot(receiver, a, 17, record)
        assert at_b["chunk"] == find_slot(sender, b, 17, record)["chunk"]
        assert at_b["offset"] < receiver.region_bytes()[constants["REGION_RECEIVE"]]


def test_long_buffers_get_longer_chunks():
    plan, _, config = plan_of(64, 8, max_tokens=1 << 16, chunk_records=8, hidden=16)
    assert plan.num_signals <= 1 << 16
    assert int(plan.chunking["num_chunks"] * plan.chunking["chunk_records"]) >= config.max_tokens


def test_more_than_the_fabric_addresses_is_refused():
    with pytest.raises(ValueError, match="max_tokens"):
        plan_of(64, 8, max_tokens=1 << 16, hidden=7168)


def test_slots_are_numbered_as_on_the_cpu():
    nodes, per_node, tokens = 3, 2, 40
    plan, topology, config = plan_of(nodes, per_node)
    rng = np.random.default_rng(0)
    topk_idx = np.argsort(rng.random((tokens, config.num_experts)), axis=1)[:, :4]
    layout = make_layout(topk_idx, topology.node_of_R, config.num_experts, False)
    record = dispatch_record(WireFormat.BF16, config.hidden, config.num_topk).bytes
    for node in range(1, nodes):
        slots = layout.slot_TN[:, node]
        sent = slots[slots >= 0]
        assert sent.tolist() == list(range(len(sent)))
        offsets = [int(find_slot(plan, node, s, record)["offset"]) for s in sent.tolist()]
        assert np.diff(offsets).tolist() == [record] * (len(sent) - 1)


@pytest.mark.parametrize("cap", [None, 100 << 20])
@pytest.mark.parametrize("fabric", ["auto", "proxy/local", "emulated", "proxy/emulated"])
def test_memory_of_scale_out_is_what_is_allocated(fabric, cap):
    topology = make_topology(0, [0] * 12, 4)
    config = Config(7168, 240, 8, 4096, max_staging_bytes=cap)
    report = rail.report_staging(topology, config, fabric)
    chunk_records = 256 if fabric == "proxy/local" else 64
    plan = rail.plan_rail(topology, config, chunk_records=chunk_records)
    assert plan.bounded == (cap is not None)
    staging, why = report["scale-out staging"]
    # Two other nodes, in and out, float32 records; the first chunk out twice more.
    if cap is None:
        records = 2 * 4096 + 2 * chunk_records
        assert staging == 2 * records * rail.largest_record(config)
    else:
        assert cap - 4 * chunk_records * rail.largest_record(config) < staging <= cap
        assert f"{plan.held_chunks} chunks" in why
    state = sum(np.zeros(shape, dtype).nbytes for shape, dtype in plan.state_shapes().values())
    parts = ("staging", "signals", "announcements")
    assert sum(report[f"scale-out {part}"][0] for part in parts) == state + sum(
        plan.region_bytes().values()
    )
    hops = rail.hop_shapes(plan, topology, config, 4096, by_expert=True)
    assert report["scale-out routes"][0] == sum(
        np.zeros(shape, dtype).nbytes for shape, dtype in hops.values()
    )
    options = rail.fabric_options(
        "local-cuda", "", num_channels=rail.channels_to(1), threads=2, spin=1000
    )
    assert report["fabric rings"][0] == sum(RingMemory.sizes(options))
    assert rail.report_staging(make_topology(0, [0] * 4, 4), config) == {}


def test_announcements_have_the_size_that_control_blocks_give_them():
    if not hasattr(native.library, "epcomm_cuda_announcement_offset"):
        pytest.skip("libepcomm was built without CUDA")
    _, topology, config = plan_of(3, 2)
    sizes = (topology.num_nodes, topology.num_ranks, config.num_experts)
    first, second = (
        native.library.epcomm_cuda_announcement_offset(*sizes, rank, 0) for rank in (0, 1)
    )
    assert rail.announcement_bytes(topology, config.num_experts) == second - first
