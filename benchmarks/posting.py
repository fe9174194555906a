"""How fast kernels post: requests that they write themselves, or triggers for proxy threads.

A *put* here has a signal with it: two 64-byte requests and a doorbell of a kernel, or one 16-byte
trigger that a proxy thread makes these of. Rank 0 puts to rank 1, each a node of its own; both
check what arrives. ``bash launch/bench.sh --nodes 2 --cases posting`` measures.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from epcomm.fabric.abi import Place, constants, dtypes
from epcomm.fabric.fabric import Fabric, RegionMemory
from epcomm.fabric.ladder import TRANSPORTS
from epcomm.native import library
from epcomm.topology import make_topology

from .verify import VerificationError

_T = TypeVar("_T")
_SIGNALS, _OUT, _IN = constants["SIGNALS"], 1, 2
_SIGNAL_BYTES = 1 << 16
_TIMEOUT = 20.0
#: Of the GPU's timer that no warp has noted yet.
_NEVER = np.iinfo(np.uint64).max
#: Behind the channels' own signals: those of the self-test.
_SPLIT_SIGNALS = 2


@dataclass(frozen=True)
class Writers:
    """Who posts: ``warps`` to each of ``queue_pairs``, the first lane of each.

    Attributes:
        queue_pairs: channels, a block for each.
        warps: of a block.
    """

    queue_pairs: int
    warps: int

    @property
    def count(self) -> int:
        """Of all queue pairs."""
        return self.queue_pairs * self.warps


@dataclass(frozen=True)
class PostingSweep:
    """What is measured.

    Attributes:
        sizes: bytes of a put.
        writers: in order.
        burst: puts of a queue pair that fit into it (or into its ring) beside all others'.
        many: puts of a queue pair, of which most have to wait for room.
        places: of each warp, which its puts take in turn.
        repeats: of each measurement.
        trips: puts of one warp that waits for each.
    """

    sizes: tuple[int, ...] = (64, 7168)
    writers: tuple[Writers, ...] = (
        Writers(1, 1),
        Writers(1, 4),
        Writers(1, 8),
        Writers(4, 1),
        Writers(16, 1),
        Writers(4, 8),
    )
    burst: int = 256
    many: int = 4096
    places: int = 16
    repeats: int = 5
    trips: int = 300

    @property
    def channels(self) -> int:
        """The most queue pairs."""
        return max(writers.queue_pairs for writers in self.writers)

    @property
    def region_bytes(self) -> int:
        """Of the places of the most writers, and 4 KiB behind them that nothing may reach."""
        most = max(writers.count for writers in self.writers)
        return most * self.places * max(self.sizes) + 4096


@dataclass(frozen=True)
class Span:
    """Nanoseconds from the first warp's begin until the last one had put all, and saw it complete.

    ``completed`` is 0 where nothing completes: of the floor.
    """

    posted: float
    completed: float


def span_of(result: np.ndarray) -> Span:
    """From what a kernel noted, ``epcomm_posting_probe.result``: uint64 [4].

    Raises:
        RuntimeError: a put failed, or a warp noted nothing.
    """
    failures, begin, posted, completed = result.tolist()
    if failures:
        raise RuntimeError(f"{failures} writers failed without an error of the fabric")
    if begin == _NEVER or posted < begin:
        raise RuntimeError("the kernel noted no times")
    return Span(float(posted - begin), float(max(0, completed - begin)))


class PostingWorld:
    """A fabric between two ranks over memory of their GPUs. Collective to make, check and close.

    Args:
        comm: of two ranks.
        bootstrap: of these.
        fabric: as Buffer takes it, with options.
        sweep: how much memory it takes.
    """

    def __init__(self, comm: Any, bootstrap: Any, fabric: str, sweep: PostingSweep) -> None:
        import cupy

        from epcomm.cuda.memory import DeviceBlock
        from epcomm.cuda.nics import with_nic_sms
        from epcomm.cuda.rail import fabric_options
        from epcomm.cuda.rings import DeviceRings

        self._cupy, self._runtime = cupy, cupy.cuda.runtime
        self._comm, self._sweep = comm, sweep
        self._raised = np.zeros(sweep.channels + _SPLIT_SIGNALS, np.int64)
        how = fabric_options(
            TRANSPORTS[fabric.partition(" ")[0]],
            with_nic_sms(fabric),
            num_channels=sweep.channels,
            threads=2,
            spin=1000,
        )
        # Rings in which a burst of all channels fits, as it does in their send queues.
        slots = 1 << (sweep.channels * sweep.burst // how.num_rings - 1).bit_length()
        how = replace(how, num_slots=slots, timeout=_TIMEOUT)
        sizes = {_SIGNALS: _SIGNAL_BYTES, _OUT: sweep.region_bytes, _IN: sweep.region_bytes}
        self._blocks = {number: DeviceBlock(nbytes) for number, nbytes in sizes.items()}
        for block in self._blocks.values():
            self._runtime.memset(block.pointer, 0, block.num_bytes)
        words = sweep.region_bytes // 8
        self._out = self._blocks[_OUT].array(0, (words,), np.uint64)
        self._inbox = self._blocks[_IN].array(0, (words,), np.uint64)
        # The same on both ranks: what the other one sends is known here.
        self._out[:] = cupy.arange(1, words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self._signals = self._blocks[_SIGNALS].array(0, (_SIGNAL_BYTES // 8,), np.uint64)
        self._result = cupy.zeros(7, np.uint64)
        self._times = cupy.zeros(sweep.trips, np.uint64)
        self._runtime.deviceSynchronize()
        device = self._runtime.getDevice()
        regions = {
            number: RegionMemory(self._blocks[number].pointer, nbytes, self._blocks[number])
            for number, nbytes in sizes.items()
        }
        regions = {number: replace(region, device=device) for number, region in regions.items()}
        self._rings = DeviceRings(how)
        topology = make_topology(comm.rank, bootstrap.hosts(), 1)
        self.fabric = Fabric(bootstrap, topology, how, regions, self._rings.memory)
        self._unread = self._make_unread()

    @property
    def direct(self) -> bool:
        """Whether kernels post by themselves."""
        return self.fabric.ibgda is not None

    @property
    def _kind(self) -> int:
        return constants["KIND_IBGDA" if self.direct else "KIND_PROXY"]

    def _make_unread(self) -> Any:
        """Memory for the floor, where queues lie, or rings: on the GPU, or in pinned memory."""
        from epcomm.cuda.memory import DeviceBlock, PinnedBlock

        most = max(writers.count for writers in self._sweep.writers)
        nbytes = library.epcomm_fabric_probe_unread_bytes(self._kind, most)
        return DeviceBlock(nbytes) if self.direct else PinnedBlock(nbytes)

    # By rank 0 alone ----------------------------------------------------------------------

    def put(self, writers: Writers, nbytes: int, puts: int) -> Span:
        """So many puts of a queue pair, dealt to its warps."""
        probe = self._probe(writers, nbytes, puts)
        span = self._run(library.epcomm_fabric_probe_posting, probe)
        self._raised[: writers.queue_pairs] += writers.warps * int(probe["puts"])
        return span

    def floor(self, writers: Writers, nbytes: int, puts: int) -> Span:
        """The same stores with nobody to read them."""
        return self._run(library.epcomm_fabric_probe_unread, self._probe(writers, nbytes, puts))

    def trips(self, nbytes: int) -> np.ndarray:
        """Nanoseconds from a put's begin until its writer saw its completion: uint64 [trips]."""
        probe = self._probe(Writers(1, 1), nbytes, self._sweep.trips)
        probe["times"] = self._times.data.ptr
        self._run(library.epcomm_fabric_probe_posting, probe)
        self._raised[0] += self._sweep.trips
        return self._times.get()

    def split(self, nbytes: int) -> tuple[float, float]:
        """The shortest nanoseconds of a put until the doorbell has rung, and from there on.

        By the self-test of direct transports, until it saw the completion.
        """
        probe = np.zeros((), dtypes["ibgda_probe"])
        probe["ibgda"] = np.frombuffer(self.fabric.ibgda or b"", np.uint8)
        probe["local"], probe["remote"] = _place(_OUT), _place(_IN)
        probe["bytes"], probe["peer"], probe["rounds"] = nbytes, 1, self._sweep.trips
        probe["signal"] = self._sweep.channels
        probe["other_signal"] = self._sweep.channels + 1
        words = self._launch(library.epcomm_fabric_probe_ibgda, probe)
        if words[0]:
            raise RuntimeError(f"{words[0]} rounds failed without an error of the fabric")
        self._raised[self._sweep.channels :] += self._sweep.trips
        return float(words[1]), float(words[2])

    def _probe(self, writers: Writers, nbytes: int, puts: int) -> np.ndarray:
        probe = np.zeros((), dtypes["posting_probe"])
        probe["fabric"] = np.frombuffer(self.fabric.struct, np.uint8)
        if self.direct:
            probe["ibgda"] = np.frombuffer(self.fabric.ibgda or b"", np.uint8)
        probe["kind"], probe["unread"] = self._kind, self._unread.pointer
        probe["local"], probe["remote"] = _place(_OUT), _place(_IN)
        probe["bytes"], probe["peer"] = nbytes, 1
        probe["num_channels"], probe["num_warps"] = writers.queue_pairs, writers.warps
        probe["puts"], probe["num_places"] = puts // writers.warps, self._sweep.places
        return probe

    def _run(self, launch: Any, probe: np.ndarray) -> Span:
        return span_of(self._launch(launch, probe)[:4])

    def _launch(self, launch: Any, probe: np.ndarray) -> np.ndarray:
        """Run a kernel; what it wrote as its result: uint64 [7]."""
        probe["result"], probe["timeout_ns"] = self._result.data.ptr, int(_TIMEOUT * 1e9)
        self._result.set(np.array([0, _NEVER, 0, 0, 0, 0, 0], np.uint64))
        self._runtime.deviceSynchronize()
        error = launch(probe.ctypes.data, None)
        if error != 0:
            raise RuntimeError(f"the kernel did not start: CUDA error {error}")
        self._runtime.deviceSynchronize()
        self.fabric.check()
        return self._result.get()

    # By both ------------------------------------------------------------------------------

    def by_writer(self, action: Callable[[], _T]) -> _T:
        """Let rank 0 act while rank 1 waits; both return what it returned.

        Raises:
            RuntimeError: it failed, with its words; on both ranks.
        """
        result, error = None, ""
        if self._comm.rank == 0:
            try:
                result = action()
            except Exception as caught:
                error = f"{type(caught).__name__}: {caught}"
        result, error = self._comm.bcast((result, error))
        if error:
            raise RuntimeError(error)
        return result

    def clear(self) -> None:
        """Forget what has arrived."""
        self._inbox[:] = 0
        self._runtime.deviceSynchronize()
        self._comm.Barrier()

    def check(self, writers: Writers, nbytes: int) -> None:
        """Compare what has arrived since ``clear``, and all signals, with what was put.

        Raises:
            VerificationError: on both ranks, where they differ.
        """
        raised = self._comm.bcast(self._raised)
        wrong = ""
        if self._comm.rank == 1:
            used = writers.count * self._sweep.places * nbytes // 8
            different = int((self._inbox[:used] != self._out[:used]).sum())
            outside = int(self._cupy.count_nonzero(self._inbox[used:]))
            signals = self._signals[: len(raised)].get()
            wrong = describe_wrong(different, outside, signals, raised)
        wrong = self._comm.bcast(wrong, root=1)
        if wrong:
            raise VerificationError(f"{self.fabric.describe()}: {nbytes} bytes a put: {wrong}")

    def close(self) -> None:
        """Let go of everything; the ranks' network cards end together."""
        self._comm.Barrier()
        self.fabric.close()
        self._comm.Barrier()
        self._rings.close()
        for block in (*self._blocks.values(), self._unread):
            block.close()


def _place(region: int) -> np.ndarray:
    return np.frombuffer(bytes(Place(region, 0)), np.uint8)


def describe_wrong(different: int, outside: int, signals: np.ndarray, raised: np.ndarray) -> str:
    """What is wrong with what has arrived; empty: nothing.

    Args:
        different: words of places that differ from what was put there.
        outside: words elsewhere that are not zero.
        signals: counters as they are: uint64 [n].
        raised: how often each was raised: int64 [n].
    """
    found = []
    if different:
        found.append(f"{different} words differ from what was put")
    if outside:
        found.append(f"{outside} words were written where nothing was put")
    found += [
        f"signal {index} is {signals[index]}, and was raised {raised[index]} times"
        for index in np.flatnonzero(signals.astype(np.int64) != raised).tolist()
    ]
    return "; ".join(found)
