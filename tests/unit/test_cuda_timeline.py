"""A CUDA buffer's timeline without a GPU: what kernels are given, and what their notes become."""

import ctypes
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from epcomm.cuda import abi

if not abi.available:
    pytest.skip("libepcomm was built without CUDA", allow_module_level=True)

from cuda_stand_ins import RANK, Gpu, make_buffer

from epcomm.backend import Options
from epcomm.clocks import HostClock
from epcomm.fabric.abi import constants as fabric_constants
from epcomm.fabric.abi import dtypes as fabric_dtypes

pytestmark = pytest.mark.timeout(60)

ROWS = torch.zeros(6, 256, dtype=torch.bfloat16)
CHOICES = torch.arange(18).view(6, 3) % 16


class Rings:
    """What a kernel finds in ``world.timeline``."""

    def __init__(self, pointer: int) -> None:
        block = abi.structures["timeline"].from_address(pointer)
        self.capacity, self.num_blocks = block.capacity, block.num_blocks
        self._spans, self._counts = block.spans, block.counts

    def note(self, block: int, **fields: Any) -> None:
        """As a kernel does; a role that is not given is a warp's."""
        count = ctypes.c_uint64.from_address(self._counts + 8 * block)
        place = block * self.capacity + count.value % self.capacity
        span = abi.structures["span"].from_address(
            self._spans + place * abi.dtypes["span"].itemsize
        )
        for name, value in {"node": -1, "chunk": -1, "block": block, **fields}.items():
            setattr(span, name, value)
        count.value += 1


@dataclass
class Nics:
    """A fabric of two nodes over emulated NICs on the GPU, or one that tells nothing."""

    tells: bool = True
    total: int = 0
    told: np.ndarray = field(default_factory=lambda: np.zeros(0, fabric_dtypes["message"]))
    incidents: np.ndarray = field(default_factory=lambda: np.zeros(0, fabric_dtypes["event"]))
    total_incidents: int = 0
    kept: list[int] = field(default_factory=list)
    options = SimpleNamespace(transport="some-nics")
    ibgda = None

    def keep_messages(self, capacity: int) -> bool:
        self.kept.append(capacity)
        return self.tells

    def messages(self) -> tuple[np.ndarray, int]:
        return self.told, self.total

    def events(self) -> tuple[np.ndarray, int]:
        return self.incidents, self.total_incidents


def timeline_over(buffer: Any, nics: Nics) -> Any:
    """A timeline as that of ``buffer``, of rank 1 of 4 on two nodes."""
    own = buffer._backend._timeline
    plan = SimpleNamespace(chunking={"num_channels": 4}, held_chunks=0)
    topology = SimpleNamespace(rank=RANK, node=0, local_rank=1, rail=(1, 3))
    device = SimpleNamespace(identity="a GPU", num_sms=16)
    return type(own)(topology, own._clock, device, SimpleNamespace(fabric=nics, plan=plan))


@pytest.fixture
def gpu():
    return Gpu()


def test_kernels_are_given_no_timeline_by_default(monkeypatch, gpu):
    buffer = make_buffer(monkeypatch, gpu)
    buffer.dispatch(ROWS, CHOICES)
    assert [launch.block.world.timeline for launch in gpu.launches] == [0] * len(gpu.launches)
    with pytest.raises(ValueError, match="timeline: this Buffer notes nothing"):
        buffer.timeline()


def test_a_trace_has_what_the_kernels_noted(monkeypatch, gpu):
    buffer = make_buffer(monkeypatch, gpu, timeline=True)
    result = buffer.dispatch(ROWS, CHOICES)
    buffer.combine(buffer.combine_input(result.handle), result.handle)
    pointers = {launch.block.world.timeline for launch in gpu.launches}
    assert {launch.name for launch in gpu.launches} == {"dispatch", "combine"}
    (pointer,) = pointers
    rings = Rings(pointer)
    assert rings.num_blocks == 16  # of a call
    assert rings.capacity & (rings.capacity - 1) == 0
    store, arrive = abi.constants["ROLE_STORE"], abi.constants["ROLE_ARRIVE"]
    rings.note(0, role=store, warp=3, begin=5000, end=9000, epoch=1, items=6)
    rings.note(15, role=arrive, warp=-1, begin=9500, end=9900, epoch=1)
    gpu.clocks = (9000, 700_000, 21)
    trace = buffer.timeline()
    slices = [e for e in trace.events if e["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"], e["pid"]) for e in slices] == [
        ("store", 0.0, 4.0, RANK),
        ("arrive", 4.5, 0.4, RANK),
    ]
    assert trace.data["otherData"]["base_ns"] == 5000
    names = {e["args"]["name"] for e in trace.events if e["name"] == "thread_name"}
    assert names == {"block 0 warp 3", "block 15"}
    clock = trace.ranks[0]["clock"]
    assert clock["domain"] == "GPU a GPU"
    assert (clock["ns"], clock["host_ns"], clock["error_ns"]) == (9000, 700_000, 21)
    assert trace.ranks[0]["not_shown"] == []  # one node
    assert trace.lost == 0


def test_what_a_ring_lost_is_counted_and_a_restart_forgets(monkeypatch, gpu):
    buffer = make_buffer(monkeypatch, gpu, timeline=True)
    buffer.dispatch(ROWS, CHOICES)
    rings = Rings(gpu.launches[0].block.world.timeline)
    store = abi.constants["ROLE_STORE"]
    for number in range(rings.capacity + 3):
        rings.note(5, role=store, begin=100 + number, end=101 + number, epoch=1)
    trace = buffer.timeline(restart=True)
    slices = [e for e in trace.events if e["ph"] == "X"]
    assert len(slices) == rings.capacity
    assert trace.data["otherData"]["base_ns"] == 103
    assert trace.lost == 3
    assert not [e for e in buffer.timeline().events if e["ph"] == "X"]


def test_messages_of_nics_on_the_gpu_are_in_the_trace(monkeypatch, gpu):
    nics = Nics(total=7, told=np.zeros(2, fabric_dtypes["message"]))
    timeline = timeline_over(make_buffer(monkeypatch, gpu, timeline=True), nics)
    store = abi.constants["ROLE_STORE"]
    Rings(timeline.pointer).note(0, role=store, warp=3, begin=5000, end=9000, epoch=1)
    nics.told["depart_ns"], nics.told["arrive_ns"] = (4000, 6000), (5500, 7500)
    nics.told["landed_ns"], nics.told["bytes"] = (5600, 7500), (4096, 8)
    nics.told["queue_pair"], nics.told["peer"], nics.told["channel"] = 0x102, 1, 3
    nics.told["plane"], nics.told["position"] = 1, (0, 1)
    trace = timeline.read(restart=True)
    # By the same clock as the kernels' spans.
    assert trace.data["otherData"]["base_ns"] == 4000
    assert [e["ts"] for e in trace.events if e["name"] == "store"] == [1.0]
    name = "NIC plane 1 queue pair 0x102 (channel 3 to rank 3)"
    named = [(e["ph"], round(e["ts"], 3)) for e in trace.events if e["name"] == name]
    assert named == [("b", 0.0), ("e", 1.6), ("b", 2.0), ("e", 3.5)]
    assert [e["args"]["bytes"] for e in trace.events if e["name"] == name and e["ph"] == "b"] == [
        4096,
        8,
    ]
    assert trace.ranks[0]["not_shown"] == []
    assert trace.ranks[0]["lost_messages"] == trace.lost == 5
    # Asked for when it was made, and forgotten with the spans.
    assert len(nics.kept) == 2
    assert nics.kept[0] == nics.kept[1] > 0


def test_incidents_of_nics_on_the_gpu_are_in_the_trace(monkeypatch, gpu):
    nics = Nics(incidents=np.zeros(1, fabric_dtypes["event"]), total_incidents=3)
    timeline = timeline_over(make_buffer(monkeypatch, gpu, timeline=True), nics)
    store = abi.constants["ROLE_STORE"]
    Rings(timeline.pointer).note(0, role=store, warp=3, begin=5000, end=9000, epoch=1)
    nics.incidents["time_ns"], nics.incidents["peer"] = 4000, 1
    nics.incidents["kind"], nics.incidents["code"] = fabric_constants["FAULT"], 1
    trace = timeline.read(restart=False)
    assert trace.data["otherData"]["base_ns"] == 4000
    assert [e["ts"] for e in trace.events if e["name"] == "store"] == [1.0]
    (instant,) = [e for e in trace.events if e["name"] == "fault: delay"]
    assert (instant["ph"], instant["ts"], instant["args"]["to rank"]) == ("i", 0.0, 3)
    assert trace.ranks[0]["lost_events"] == trace.lost == 2


def test_a_network_that_tells_nothing_is_named(monkeypatch, gpu):
    nics = Nics(tells=False)
    timeline = timeline_over(make_buffer(monkeypatch, gpu, timeline=True), nics)
    (words,) = timeline.read(restart=True).ranks[0]["not_shown"]
    assert "transport 'some-nics' does not tell" in words
    assert len(nics.kept) == 1


@pytest.mark.parametrize("wanted", [False, True])
def test_nics_are_told_beforehand_whether_messages_are_wanted(monkeypatch, gpu, wanted):
    """Their kernel runs all the time: nothing can be allocated beside it."""
    backend = make_buffer(monkeypatch, gpu, timeline=wanted)._backend
    scale_out = type(backend).__init__.__globals__["ScaleOut"]
    clock = HostClock("here", 0, 0) if wanted else None
    own = SimpleNamespace(plan=SimpleNamespace(chunking={"num_channels": 4}))
    how = Options(timeout=1.0, num_threads=1, own_core=False, timeline=clock)
    options = scale_out._fabric_options(own, how, "emulated-cuda", "")
    if wanted:
        nics = Nics()
        timeline_over(make_buffer(monkeypatch, gpu, timeline=True), nics)
        assert nics.kept == [options.max_messages]
    else:
        assert options.max_messages == 0


def test_every_role_has_a_name(monkeypatch, gpu):
    """And its numbers are those of the library."""
    buffer = make_buffer(monkeypatch, gpu, timeline=True)
    buffer.dispatch(ROWS, CHOICES)
    rings = Rings(gpu.launches[0].block.world.timeline)
    roles = {name: n for name, n in abi.constants.items() if name.startswith("ROLE_")}
    for number in roles.values():
        rings.note(0, role=number, begin=1 + number, end=2 + number, epoch=1)
    names = {e["name"] for e in buffer.timeline().events if e["ph"] == "X"}
    assert names == {name.removeprefix("ROLE_").lower() for name in roles}
    assert np.all(np.diff(sorted(roles.values())) == 1)


def test_hosts_of_all_ranks_are_one_here(monkeypatch, gpu):
    buffer = make_buffer(monkeypatch, gpu, timeline=True)
    clock = buffer._backend._timeline._clock
    assert isinstance(clock, HostClock)
    assert clock.offset_ns == clock.error_ns == 0
