"""Live self-tests: bytes and signals over a transport, and operations that must fail."""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cpu.segments import Segment
from ..errors import FabricError
from ..fabric.abi import Place, constants
from ..fabric.fabric import Fabric, FabricOptions, RegionMemory, RingMemory
from ..fabric.twins import Twin
from ..native import library
from ..topology import Topology
from .guard import ProbeError, within
from .pair import PairBootstrap, run_pair
from .report import BROKEN, OK, Finding

TOPIC = "self-tests"
#: Seconds a step may take; an NIC's retries, shortened below, end far earlier.
SOON = 5.0
_DEADLINE = 15.0
_SIGNALS, _OUT, _IN = constants["SIGNALS"], 1, 2
_NOT_THERE = constants["MAX_REGIONS"] - 1
NBYTES = 1 << 20
_TURNS = 20


@dataclass(frozen=True)
class SelfTest:
    """A transport to try.

    Attributes:
        name: of the finding.
        transport: as the library calls it.
        arguments: the transport's own.
        remedy: what to do if it fails.
        on_gpu: its regions are memory of GPU 0.
        direct: whoever has data to send fills the card's queues itself.
    """

    name: str
    transport: str
    arguments: str
    remedy: str
    on_gpu: bool = False
    direct: bool = False


class HostMemory:
    """Shared memory of this process."""

    def __init__(self) -> None:
        self._segment = Segment.create("epcomm-doctor", NBYTES)
        self.region = RegionMemory(self._segment.address, NBYTES, self._segment, self._segment.fd)

    def write(self, data: np.ndarray) -> None:
        ctypes.memmove(self._segment.address, data.ctypes.data, data.nbytes)

    def read(self) -> np.ndarray:
        """All its bytes."""
        return np.frombuffer(ctypes.string_at(self._segment.address, NBYTES), np.uint8)

    def counter(self) -> int:
        return int(library.epcomm_counter_read(self._segment.address))


class DeviceMemory:
    """Of GPU 0. Imports CuPy only here: where there is no GPU there may be none."""

    def __init__(self) -> None:
        from cupy.cuda import runtime

        from ..cuda.memory import DeviceBlock

        runtime.setDevice(0)
        self._runtime = runtime
        self._block = DeviceBlock(NBYTES)
        runtime.memset(self._block.pointer, 0, self._block.num_bytes)
        runtime.deviceSynchronize()
        self.region = RegionMemory(self._block.pointer, NBYTES, self._block, device=0)

    def write(self, data: np.ndarray) -> None:
        host_to_device = 1
        self._runtime.memcpy(self._block.pointer, data.ctypes.data, data.nbytes, host_to_device)

    @staticmethod
    def wait() -> None:
        """Return once all kernels have ended."""
        from cupy.cuda import runtime

        runtime.deviceSynchronize()

    def _fetch(self, nbytes: int) -> np.ndarray:
        data = np.empty(nbytes, np.uint8)
        device_to_host = 2
        self._runtime.memcpy(data.ctypes.data, self._block.pointer, nbytes, device_to_host)
        return data

    def read(self) -> np.ndarray:
        return self._fetch(NBYTES)

    def counter(self) -> int:
        return int(self._fetch(8).view(np.uint64)[0])


class End:
    """A rank's fabric with counters, memory to send from and memory to receive into."""

    def __init__(self, bootstrap: PairBootstrap | Twin, test: SelfTest) -> None:
        make: Callable[[], Any] = DeviceMemory if test.on_gpu else HostMemory
        self.peer = 1 - bootstrap.rank
        self.signals, self.out, self.inbox = make(), make(), make()
        memory = {_SIGNALS: self.signals, _OUT: self.out, _IN: self.inbox}
        options = FabricOptions(test.transport, test.arguments, timeout=SOON)
        self.fabric = Fabric(
            bootstrap,  # type: ignore[arg-type]
            Topology(bootstrap.rank, (0, 1)),
            options,
            {region: held.region for region, held in memory.items()},
            self._pinned(options) if test.direct and test.on_gpu else None,
        )

    @staticmethod
    def _pinned(options: FabricOptions) -> RingMemory:
        """The fabric's state where a kernel can see that it failed."""
        from ..cuda.rings import DeviceRings

        return DeviceRings(options).memory

    def put_signal(self, remote: Place) -> None:
        self.fabric.put_signal((self.peer, 0), remote, Place(_OUT, 0), NBYTES // 2, 0)

    def await_counter(self, expected: int) -> None:
        deadline = time.monotonic() + SOON
        while self.signals.counter() < expected:
            self.fabric.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.signals.counter()} of {expected} signals came")
            time.sleep(1e-5)

    def await_error(self) -> FabricError:
        deadline = time.monotonic() + SOON
        while time.monotonic() < deadline:
            try:
                self.fabric.check()
            except FabricError as error:
                return error
            time.sleep(1e-4)
        raise TimeoutError("a bad operation was reported by nobody")


def pattern(rank: int) -> np.ndarray:
    """Bytes of a rank."""
    return np.random.default_rng(rank).integers(0, 256, NBYTES, np.uint8)


def exchange(bootstrap: PairBootstrap, test: SelfTest) -> str:
    """Half a MiB each way, several times, each with a signal; what the transport says of itself."""
    end = End(bootstrap, test)
    try:
        end.out.write(pattern(bootstrap.rank))
        bootstrap.barrier()
        started = time.monotonic()
        for turn in range(_TURNS):
            end.put_signal(Place(_IN, 0))
            end.await_counter(turn + 1)
        seconds = time.monotonic() - started
        end.fabric.flush(0, SOON)
        half = NBYTES // 2
        received = end.inbox.read()
        if not np.array_equal(received[:half], pattern(end.peer)[:half]):
            raise FabricError("a signal came before its bytes, or they are wrong")
        if received[half:].any():
            raise FabricError("bytes came where none were sent")
        text = f"{end.fabric.describe()}; {half >> 10} KiB and a signal each way in "
        text += f"{seconds / _TURNS * 1e6:.0f} us"
        bootstrap.barrier()
        return text
    finally:
        end.fabric.close()


BAD_PLACES = {
    "a bad key": Place(_NOT_THERE, 0),
    "a place out of range": Place(_IN, NBYTES - 16),
}


def put_badly(bootstrap: PairBootstrap, test: SelfTest, place: str) -> str:
    """Rank 0 writes to a place that rank 1 has not registered; the error it gets.

    Raises:
        FabricError: it was reported as something else.
        TimeoutError: nobody reported it.
    """
    end = End(bootstrap, test)
    try:
        text = ""
        if bootstrap.rank == 0:
            end.out.write(pattern(0))
            end.put_signal(BAD_PLACES[place])
            error = end.await_error()
            if error.status != constants["TRANSPORT"] or error.ranks != (end.peer,):
                raise error
            text = str(error)
        bootstrap.barrier()
        if bootstrap.rank == 1 and (end.signals.counter() or end.inbox.read().any()):
            raise FabricError("a refused operation has changed memory")
        bootstrap.barrier()
        return text
    finally:
        end.fabric.close()


Body = Callable[..., str]
Run = Callable[..., Any]


def run_self_test(
    test: SelfTest, good: Body = exchange, bad: Body = put_badly, run: Run = run_pair
) -> list[Finding]:
    """What works over a transport: an exchange, then every forced error.

    Args:
        test: the transport.
        good: ``good(bootstrap, test)`` sends and compares.
        bad: ``bad(bootstrap, test, place)`` sends where it must be refused.
        run: ``run(seconds, body, test, ...)`` runs a body on two ranks.
    """

    def attempt(body: Body, *arguments: Any) -> str:
        return within(_DEADLINE, run, _DEADLINE, body, test, *arguments)

    try:
        text = attempt(good)
    except ProbeError as error:
        return [Finding(TOPIC, test.name, BROKEN, str(error), test.remedy)]
    findings = [Finding(TOPIC, test.name, OK, text)]
    for place in BAD_PLACES:
        name = f"{test.name}, {place}"
        try:
            findings.append(Finding(TOPIC, name, OK, f"refused: {attempt(bad, place)}"))
        except ProbeError as error:
            remedy = f"an error over {test.transport} may go unnoticed: use another fabric"
            findings.append(Finding(TOPIC, name, BROKEN, str(error), remedy))
    return findings
