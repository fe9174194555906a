"""Several ranks as forked processes, which may die without taking the test along.

A fork has the parent's imports: where those take long (in a virtual machine that emulates its
processor), ranks still start at once.
"""

import ctypes
import mmap
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from epcomm.fabric.abi import Place
from epcomm.fabric.fabric import Fabric, FabricOptions, RegionMemory, RingMemory
from epcomm.native import library
from epcomm.topology import Topology

#: Seconds until a rank counts as hanging; long, as processors may be emulated.
PATIENCE = 60.0
SIGNALS, OUT, IN = 0, 1, 2
REGION_BYTES = 1 << 20
NUM_SIGNALS = 64
#: Transports whose operations kernels post by themselves.
DIRECT = ("emulated-cuda",)


class FileBootstrap:
    """All-gather through files: ranks need nothing of each other but a folder."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self.rank, self.size = rank, size
        self._folder = folder
        self._turn = 0

    def allgather(self, item: Any) -> list[Any]:
        self._turn += 1
        mine = self._folder / f"{self._turn}.{self.rank}.new"
        mine.write_bytes(pickle.dumps(item))
        mine.rename(mine.with_suffix(".item"))  # at once, so that nobody reads a part
        return [self._read(self._folder / f"{self._turn}.{r}.item") for r in range(self.size)]

    def _read(self, path: Path) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not path.exists():
            assert time.monotonic() < deadline, f"no {path.name}: that rank does not come"
            time.sleep(0.002)
        return pickle.loads(path.read_bytes())

    def barrier(self) -> None:
        self.allgather(None)


class SharedMemory:
    """Zeros that another process can map."""

    def __init__(self, nbytes: int) -> None:
        fd = os.memfd_create("test")
        os.ftruncate(fd, nbytes)
        self._map = mmap.mmap(fd, nbytes)
        self.array = np.frombuffer(self._map, np.uint8)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.region = RegionMemory(self._address, nbytes, self, fd)

    def counter(self, index: int) -> int:
        return int(library.epcomm_counter_read(self._address + 8 * index))


class End:
    """A rank's fabric with one region to send from, one to receive into, and signals.

    Memory is the host's or, where the transport's name says CUDA, a GPU's; calls of a direct
    transport are made by kernels.
    """

    def __init__(
        self, bootstrap: FileBootstrap, transport: str, arguments: str, **how: Any
    ) -> None:
        self.bootstrap = bootstrap
        self.rank, self.size = bootstrap.rank, bootstrap.size
        # Two words more, as the last is no signal of a direct transport.
        sizes = {SIGNALS: (NUM_SIGNALS + 2) * 8, OUT: REGION_BYTES, IN: REGION_BYTES}
        on_gpu = "cuda" in transport
        memory = {region: _memory(nbytes, on_gpu) for region, nbytes in sizes.items()}
        self._signals, self.out, self.inbox = memory[SIGNALS], memory[OUT].array, memory[IN].array
        regions = {region: held.region for region, held in memory.items()}
        how = {"num_channels": 4, "num_rings": 2, "num_threads": 2, "num_slots": 64, **how}
        topology = Topology(self.rank, tuple(range(self.size)))
        options = FabricOptions(transport, arguments, **how)
        rings = _pinned(options) if transport in DIRECT else None
        fabric = Fabric(bootstrap, topology, options, regions, rings)  # type: ignore[arg-type]
        self._is_direct = transport in DIRECT
        self.fabric: Any = _by_kernels(fabric) if self._is_direct else fabric

    def put_signals(self, puts: list[tuple[tuple[int, int], Place, Place, int, int]]) -> None:
        """Many; kernels are started once."""
        if self._is_direct:
            self.fabric.put_signals(puts)
            return
        for put in puts:
            self.fabric.put_signal(*put)

    def signal(self, index: int) -> int:
        return self._signals.counter(index)

    def await_signal(self, index: int, expected: int) -> None:
        deadline = time.monotonic() + PATIENCE / 2
        while self.signal(index) < expected:
            self.fabric.check()
            assert time.monotonic() < deadline, f"signal {index}: {self.signal(index)}/{expected}"
            time.sleep(0.0005)


# CuPy is imported by ranks only, and only by those that need it: the process they are forked from
# must have nothing to do with a GPU.


def _memory(nbytes: int, on_gpu: bool) -> Any:
    if not on_gpu:
        return SharedMemory(nbytes)
    from gpu import GpuMemory

    return GpuMemory(nbytes)


def _pinned(options: FabricOptions) -> RingMemory:
    """The fabric's state where a kernel can see that it failed."""
    from epcomm.cuda.rings import DeviceRings

    return DeviceRings(options).memory


def _by_kernels(fabric: Fabric) -> Any:
    from gpu import KernelFabric

    return KernelFabric(fabric)


def end_with_parent() -> None:
    """Have this process killed when the one that forked it ends, however that ends."""
    die_with_parent = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL)


def _run(
    body: Callable[..., Any], bootstrap: FileBootstrap, results: Any, args: tuple[Any, ...]
) -> None:
    end_with_parent()
    try:
        results.put((bootstrap.rank, None, body(bootstrap, *args)))
    except BaseException:
        results.put((bootstrap.rank, traceback.format_exc(), None))
    results.close()
    results.join_thread()
    os._exit(0)


def run_ranks(
    body: Callable[..., Any], size: int, folder: Path, *args: Any, killed: tuple[int, ...] = ()
) -> list[Any]:
    """``body(bootstrap, *args)`` on every rank; returns what they returned, by rank.

    Ranks in ``killed`` end themselves by SIGKILL and return nothing.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_run, args=(body, FileBootstrap(rank, size, folder), results, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    returned: dict[int, Any] = {}
    failures = []
    try:
        for _ in range(size - len(killed)):
            rank, failure, value = results.get(timeout=PATIENCE)
            returned[rank] = value
            if failure is not None:
                failures.append(f"----- rank {rank}\n{failure}")
                break  # the others wait for it
    finally:
        deadline = time.monotonic() + (0.5 if failures else 10.0)
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                failures.append("----- a rank did not end")
                process.kill()
                process.join()
    assert not failures, "\n".join(failures)
    for rank in killed:
        assert processes[rank].exitcode == -signal.SIGKILL
    return [returned.get(rank) for rank in range(size)]
