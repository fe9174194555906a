"""The fabric over GPU memory: triggers from the host and from kernels, on virtual nodes."""

import time

import cupy
import numpy as np
import pytest

import epcomm
from epcomm.bootstrap import make_bootstrap
from epcomm.cuda.memory import DeviceBlock
from epcomm.cuda.rings import DeviceRings
from epcomm.fabric.abi import Place, dtypes, has_kernels
from epcomm.fabric.fabric import Fabric, FabricOptions, RegionMemory
from epcomm.native import library
from epcomm.topology import make_topology

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]

SIGNALS, OUT, IN = 0, 1, 2
CHANNELS = 4
NBYTES = 4 << 20
#: Transports of proxy threads, and what they say of a place that the peer has not registered.
#: Every rank puts, and fails: who is judged later finds that the peer's queue pair has failed.
REFUSALS = {
    "local-cuda": "not in a region",
    "emulated-cuda-proxy": "remote access error|the peer does not answer",
}


class World:
    """A fabric with one rank a node, over memory of this rank's GPU."""

    def __init__(self, comm, transport, device_fills, **options):
        if comm.size < 2:
            pytest.skip("needs 2 ranks")
        self.comm = comm
        bootstrap = make_bootstrap(comm)
        self.topology = make_topology(comm.rank, bootstrap.hosts(), 1)
        how = FabricOptions(
            transport,
            num_channels=CHANNELS,
            device_fills=device_fills,
            longest_nap=2e-4 if device_fills else 0.02,
            timeout=10.0,
            **options,
        )
        self.blocks = {number: DeviceBlock(NBYTES) for number in (SIGNALS, OUT, IN)}
        device = cupy.cuda.runtime.getDevice()
        for block in self.blocks.values():
            cupy.cuda.runtime.memset(block.pointer, 0, block.num_bytes)
        cupy.cuda.runtime.deviceSynchronize()
        regions = {
            number: RegionMemory(block.pointer, NBYTES, block, device=device)
            for number, block in self.blocks.items()
        }
        self.rings = DeviceRings(how) if device_fills else None
        memory = self.rings.memory if self.rings else None
        self.fabric = Fabric(bootstrap, self.topology, how, regions, memory)

    def array(self, region, dtype=np.uint64):
        return self.blocks[region].array(0, (NBYTES // np.dtype(dtype).itemsize,), dtype)

    def close(self):
        """Together: a peer's copies may still go to this rank's memory."""
        self.comm.Barrier()
        self.fabric.close()
        self.comm.Barrier()
        if self.rings:
            self.rings.close()
        for block in self.blocks.values():
            block.close()

    def wait_counter(self, index, expected):
        deadline = time.monotonic() + 20
        while int(self.array(SIGNALS)[index]) < expected:
            self.fabric.check()
            assert time.monotonic() < deadline


@pytest.fixture(params=REFUSALS)
def transport(request):
    return request.param


@pytest.fixture
def make_world(comm, transport):
    made = []

    def make(device_fills, **options):
        made.append(World(comm, transport, device_fills, **options))
        return made[-1]

    yield make
    for world in made:
        world.close()


def test_host_triggers(comm, make_world):
    """Every size and offset arrives, then its signal; on all channels to all peers."""
    world = make_world(False)
    me, fabric = comm.rank, world.fabric
    sizes = [16, 48, 4096, 100_000 // 16 * 16, 0]
    slot = NBYTES // comm.size // 16 * 16
    world.array(OUT, np.uint8)[:] = cupy.arange(NBYTES, dtype=cupy.uint32).astype(cupy.uint8) + me
    cupy.cuda.runtime.deviceSynchronize()
    for turn, nbytes in enumerate(sizes):
        for peer in range(comm.size):
            if peer != me:
                channel = turn % CHANNELS
                ticket = fabric.put_signal(
                    (peer, channel),
                    Place(IN, me * slot + 16 * turn),
                    Place(OUT, 32 * turn),
                    nbytes,
                    me * CHANNELS + channel,
                )
                assert ticket
        for peer in range(comm.size):
            if peer != me:
                index = peer * CHANNELS + turn % CHANNELS
                world.wait_counter(index, turn // CHANNELS + 1)
                got = world.array(IN, np.uint8)[peer * slot + 16 * turn :][:nbytes].get()
                want = (np.arange(nbytes) + 32 * turn + peer).astype(np.uint8)
                np.testing.assert_array_equal(got, want)
        comm.Barrier()  # the next turn overwrites what this one read
    for channel in range(CHANNELS):
        fabric.flush(channel, 20.0)
    comm.Barrier()


def probe_of(world, peer, epoch, result, **fields):
    probe = np.zeros((), dtypes["probe"])
    probe["fabric"] = np.frombuffer(world.fabric.struct, np.uint8)
    probe["out"], probe["in"] = world.blocks[OUT].pointer, world.blocks[IN].pointer
    probe["signals"] = world.blocks[SIGNALS].pointer
    probe["result"] = result.data.ptr
    for name, region in (("local", OUT), ("remote", IN)):
        place = np.zeros((), dtypes["place"])
        place["region"] = region
        probe[name] = np.frombuffer(place.tobytes(), np.uint8)
    probe["epoch"], probe["peer"], probe["num_channels"] = epoch, peer, CHANNELS
    probe["first_signal"] = world.comm.rank * CHANNELS
    probe["their_signal"] = peer * CHANNELS
    probe["timeout_ns"] = int(20e9)
    for name, value in fields.items():
        probe[name] = value
    return probe


@pytest.mark.parametrize("rings", [1, 2])
@pytest.mark.parametrize("chunk_bytes", [16, 7168, 65536])
def test_kernel_triggers(comm, make_world, rings, chunk_bytes):
    """Blocks write chunks, one thread sends each; the peer's kernel sees all of it, every time."""
    if comm.size % 2:
        pytest.skip("ranks go in pairs")
    assert has_kernels
    world = make_world(True, num_rings=rings, num_threads=rings, num_slots=16)
    result = cupy.zeros(3, cupy.uint64)
    for epoch in range(1, 21):
        # A chunk is used again only when the peer has read it.
        comm.Barrier()
        probe = probe_of(
            world, comm.rank ^ 1, epoch, result,
            bytes=chunk_bytes, num_chunks=32, num_blocks=4, num_threads=128,
        )  # fmt: skip
        assert library.epcomm_fabric_probe_exchange(probe.ctypes.data, None) == 0
        cupy.cuda.runtime.deviceSynchronize()
        world.fabric.check()
        different, failures, _ = result.get().tolist()
        assert (different, failures) == (0, 0), f"epoch {epoch}"


def test_many_kernel_producers_and_a_full_ring(comm, make_world):
    world = make_world(True, num_slots=8)
    result = cupy.zeros(3, cupy.uint64)
    probe = probe_of(
        world, (comm.rank + 1) % comm.size, 0, result, num_blocks=4, num_threads=64, triggers=50
    )
    assert library.epcomm_fabric_probe_triggers(probe.ctypes.data, None) == 0
    cupy.cuda.runtime.deviceSynchronize()
    assert result.get()[1] == 0
    assert int(world.fabric.threads["triggers"].sum()) == 4 * 64 * 50


def test_error_ends_kernels(comm, make_world, transport):
    """A put beyond the peer's region: the kernel that waits leaves, and the host knows why."""
    world = make_world(True)
    peer = (comm.rank + 1) % comm.size
    result = cupy.zeros(3, cupy.uint64)
    probe = probe_of(world, peer, 1, result, bytes=4096, num_chunks=4, num_blocks=1, num_threads=32)
    place = np.zeros((), dtypes["place"])
    place["region"], place["offset"] = IN, NBYTES
    probe["remote"] = np.frombuffer(place.tobytes(), np.uint8)
    started = time.monotonic()
    assert library.epcomm_fabric_probe_exchange(probe.ctypes.data, None) == 0
    cupy.cuda.runtime.deviceSynchronize()
    assert time.monotonic() - started < 15
    assert result.get()[1] > 0
    with pytest.raises(epcomm.FabricError, match=REFUSALS[transport]) as caught:
        world.fabric.check()
    assert caught.value.ranks == (peer,)


def ring_wrongly(fabric):
    """A doorbell that names another queue pair, where that of the rank's first one is due."""
    ibgda = np.frombuffer(fabric.ibgda, dtypes["ibgda"])[0]
    # The beginning of an mlx5::SendQueue: four pointers, the last one to the doorbell; two sizes;
    # its number.
    head = np.zeros(11, np.uint32)
    copy, to_host, to_device = cupy.cuda.runtime.memcpy, 2, 1
    copy(head.ctypes.data, int(ibgda["queues"]), head.nbytes, to_host)
    word = np.array([1 << 8, (int(head[10]) + 1) << 8], ">u4")
    copy(int(head[6:8].view(np.uint64)[0]), word.ctypes.data, word.nbytes, to_device)
    return int(head[10])


def check_for(fabric, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        fabric.check()


@pytest.mark.parametrize("transport", ["emulated-cuda"])
def test_broken_rule_that_nobody_notices_fails_the_fabric(comm, make_world):
    """Also where no operation fails, because nobody reads completions."""
    world = make_world(False)
    fabric, topology = world.fabric, world.topology
    # The first queue pair is that to node 0, which itself has none there.
    wrong = topology.node == 1
    fabric.check()
    comm.Barrier()
    if wrong:
        number = ring_wrongly(fabric)
        assert number > 0
        words = "the emulated NIC found a broken rule: doorbell queue"
        with pytest.raises(epcomm.FabricError, match=words) as caught:
            check_for(fabric, 10)
        assert caught.value.ranks == (topology.rail[0],)
        assert f"channel 0, queue pair {number}," in str(caught.value)
        assert "bytes" not in str(caught.value)
    assert comm.allreduce(wrong) == 1
    if not wrong:
        check_for(fabric, 0.5)  # longer than NICs take to tell
