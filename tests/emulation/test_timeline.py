"""What the emulated kernels note in their timelines, and the traces made of it."""

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from cases import UNEQUAL, check_case, config_of
from fabrics import Nics, Proxies, aligned
from oracle_cases import CASES
from test_bounded import make_world as make_bounded_world
from test_one_node import check, make_node
from world import EmulatedWorld

from epcomm.timeline import Clock, Lost, Trace, make_trace, merge
from epcomm.trace_events import Channels, events_of_kernels, unroll

pytestmark = pytest.mark.timeout(120)

CAPACITY = 1 << 12
#: What lies within which roles of a warp.
INSIDE = {
    "put": ("pack", "reduce"),
    "credit": ("pack", "reduce"),
    "wait": ("forward", "finish"),
}
#: Only with bounded staging.
BOUNDED_ROLES = {"credit"}


@dataclass
class Rings:
    """The memory of one rank's timeline."""

    spans: np.ndarray
    counts: np.ndarray
    block: np.ndarray

    @classmethod
    def make(cls, dtypes: dict[str, np.dtype], blocks: int, capacity: int) -> "Rings":
        spans = np.zeros((blocks, capacity), dtypes["span"])
        counts = np.zeros(blocks, np.uint64)
        block = aligned(dtypes["timeline"].itemsize).view(dtypes["timeline"])
        block["spans"], block["counts"] = spans.ctypes.data, counts.ctypes.data
        block["capacity"], block["num_blocks"] = capacity, blocks
        return cls(spans, counts, block)

    def read(self) -> tuple[np.ndarray, int]:
        return unroll(self.spans, self.counts)


def start(world: EmulatedWorld, capacity: int = CAPACITY) -> list[Rings]:
    """A timeline for every rank."""
    rings = [Rings.make(world.dtypes, world.blocks, capacity) for _ in world.ranks]
    for rank, ring in zip(world.ranks, rings, strict=True):
        rank.block["timeline"] = ring.block.ctypes.data
    return rings


def roles_of(constants: dict[str, int]) -> dict[int, str]:
    return {
        number: name.removeprefix("ROLE_").lower()
        for name, number in constants.items()
        if name.startswith("ROLE_")
    }


def trace_of(world: EmulatedWorld, rank: Any, spans: np.ndarray, lost: int = 0) -> Trace:
    """A rank's trace; all ranks are threads of one process, so their clock is one."""
    topology = rank.topology
    channels = Channels(world.fabric.channels, rank.plan.held_chunks)
    base = int(spans["begin"].min())
    events = events_of_kernels(spans, roles_of(world.constants), topology.rank, channels, base)
    return make_trace(
        events,
        base,
        Clock("process"),
        rank=topology.rank,
        node=topology.node,
        local_rank=topology.local_rank,
        lost=Lost(lost),
    )


def check_order(spans: np.ndarray, roles: dict[int, str]) -> None:
    """A warp's spans follow each other, or lie one in the other; a block's do not overlap."""
    by_warp = defaultdict(list)
    for span in spans:
        assert 0 < span["begin"] <= span["end"]
        by_warp[int(span["block"]), int(span["warp"])].append(span)
    for of_warp in by_warp.values():
        # What begins with its role comes after it.
        of_warp.sort(key=lambda s: (int(s["begin"]), roles[int(s["role"])] in INSIDE))
        outer = inner = None
        for span in of_warp:
            role = roles[int(span["role"])]
            if role in INSIDE:
                assert outer is not None
                assert roles[int(outer["role"])] in INSIDE[role]
                assert span["end"] <= outer["end"]
                assert span["epoch"] == outer["epoch"]
                assert inner is None or inner["end"] <= span["begin"]
                inner = span
            else:
                assert outer is None or outer["end"] <= span["begin"]
                outer = span


def check_puts_arrive(world: EmulatedWorld, spans_of_ranks: list[np.ndarray]) -> int:
    """Every chunk that was put was found by its receiver, not before; returns how many were."""
    roles = roles_of(world.constants)
    at = {(r.topology.node, r.topology.local_rank): i for i, r in enumerate(world.ranks)}
    puts, waits = {}, defaultdict(list)
    for me, (rank, spans) in enumerate(zip(world.ranks, spans_of_ranks, strict=True)):
        for span in spans[spans["chunk"] >= 0]:
            other = at[int(span["node"]), rank.topology.local_rank]
            call, chunk = int(span["epoch"]), int(span["chunk"])
            if roles[int(span["role"])] == "put":
                assert (call, me, other, chunk) not in puts
                puts[call, me, other, chunk] = int(span["begin"])
            else:
                waits[call, other, me, chunk].append(int(span["end"]))
    assert puts
    assert puts.keys() == waits.keys()
    for key, began in puts.items():
        # It cannot have been there before its put began.
        assert min(waits[key]) >= began
    return len(puts)


@pytest.mark.parametrize("fabric", [Proxies, Nics])
def test_spans_cover_all_roles_and_nest(emulated, fabric):
    world = EmulatedWorld(emulated, 2, 4, config_of(UNEQUAL, 4), fabric=fabric())
    rings = start(world)
    check_case(world, UNEQUAL)
    roles, seen = roles_of(world.constants), set()
    all_spans, traces = [], []
    for rank, ring in zip(world.ranks, rings, strict=True):
        spans, lost = ring.read()
        assert lost == 0
        assert len(spans) > 0
        names = np.array([roles[role] for role in spans["role"].tolist()])
        seen |= set(names.tolist())
        check_order(spans, roles)
        # Four calls: two dispatches and two combines.
        assert sorted(set(spans["epoch"].tolist())) == [1, 2, 3, 4]
        tokens = UNEQUAL.tokens[rank.topology.rank % len(UNEQUAL.tokens)]
        assert spans[names == "finish"]["items"].sum() == 2 * tokens
        received = spans[names == "forward"]["items"].sum()
        assert received == spans[names == "reduce"]["items"].sum()
        all_spans.append(spans)
        traces.append(trace_of(world, rank, spans))
    assert seen == set(roles.values()) - BOUNDED_ROLES
    puts = check_puts_arrive(world, all_spans)
    merged = json.loads(json.dumps(merge(traces).data))
    flights = [e for e in merged["traceEvents"] if e.get("cat") == "flight"]
    assert len(flights) == 2 * puts
    assert {e["pid"] for e in merged["traceEvents"]} == {0, 1, 2, 3}
    assert all(e["ts"] >= 0 for e in merged["traceEvents"] if "ts" in e)


@pytest.mark.parametrize("fabric", [Proxies, Nics])
def test_bounded_staging_shows_its_credits(emulated, fabric):
    case = replace(UNEQUAL, tokens=(31, 0, 9, 24), routing="skewed", num_topk=4)
    world = make_bounded_world(emulated, 2, 4, config_of(case, 4), (1, 2), fabric=fabric())
    rings = start(world)
    assert all(rank.plan.bounded for rank in world.ranks)
    check_case(world, case)
    roles, seen = roles_of(world.constants), set()
    all_spans = []
    for ring in rings:
        spans, lost = ring.read()
        assert lost == 0
        check_order(spans, roles)
        seen |= {roles[role] for role in spans["role"].tolist()}
        all_spans.append(spans)
    assert seen == set(roles.values())
    check_puts_arrive(world, all_spans)


def test_a_full_ring_keeps_the_newest_and_counts_the_rest(emulated):
    world = EmulatedWorld(emulated, 2, 4, config_of(UNEQUAL, 4))
    rings = start(world, 8)
    check_case(world, UNEQUAL)
    for rank, ring in zip(world.ranks, rings, strict=True):
        spans, lost = ring.read()
        assert len(spans) == 8 * world.blocks
        assert lost == int(ring.counts.sum()) - len(spans) > 0
        assert 4 in spans["epoch"].tolist()  # the last call's
        assert 1 not in spans["epoch"].tolist()
        trace = trace_of(world, rank, spans, lost)
        assert trace.lost == lost
        assert f"{lost} older spans lost" in [event["name"] for event in trace.events]


def test_without_a_timeline_nothing_is_noted(emulated):
    world = EmulatedWorld(emulated, 2, 4, config_of(UNEQUAL, 4))
    rings = start(world)
    for rank in world.ranks:
        rank.block["timeline"] = 0
    check_case(world, UNEQUAL)
    for ring in rings:
        assert not ring.counts.any()
        assert not ring.spans.view(np.uint8).any()


def test_no_timeline_is_the_default(emulated):
    world = EmulatedWorld(emulated, 2, 4, config_of(UNEQUAL, 4))
    assert all(rank.block["timeline"] == 0 for rank in world.ranks)


def test_dispatch_inside_a_node_notes_its_roles(one_node):
    case = replace(CASES["different token counts"], ranks_per_node=3)
    node = make_node(one_node, case)
    rings = [Rings.make(node.dtypes, node.blocks, CAPACITY) for _ in node.ranks]
    for rank, ring in zip(node.ranks, rings, strict=True):
        rank.world["timeline"] = ring.block.ctypes.data
    check(node, case)  # a first dispatch, two cached ones, a first one, a cached one
    roles = roles_of(node.constants)
    for rank, ring in zip(node.ranks, rings, strict=True):
        spans, lost = ring.read()
        assert lost == 0
        check_order(spans, roles)
        names = np.array([roles[role] for role in spans["role"].tolist()])
        calls = {call: set(names[spans["epoch"] == call].tolist()) for call in range(1, 6)}
        cached = {"announce", "listen", "store", "arrive"}
        assert calls[2] == calls[3] == calls[5] == cached
        assert calls[1] == calls[4] == cached | {"count", "meet", "place"}
        tokens = case.tokens[rank.rank % len(case.tokens)]
        assert spans[names == "store"]["items"].sum() == 5 * tokens
        arrive = spans[(names == "arrive") & (spans["epoch"] == 1)]
        assert len(arrive) == 1
        stored = spans[(names == "store") & (spans["epoch"] == 1)]
        assert arrive["begin"][0] >= stored["end"].max()
