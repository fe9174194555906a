"""The live self-test of IBGDA: a card's queues filled by a kernel, or by a thread of the host.

Two ends of this process are connected with each other over one port. The first writes requests and
rings; the second one's memory must then hold the bytes, and its counters the signals.
"""

import numpy as np

from ..errors import FabricError
from ..fabric.abi import Place, constants, dtypes
from ..fabric.twins import Twin, run_twins
from ..native import library
from .report import Finding
from .selftest import BAD_PLACES, NBYTES, SOON, DeviceMemory, End, SelfTest, pattern, run_self_test

_OUT, _IN = 1, 2
_ROUNDS = 20
_SIGNAL, _OTHER_SIGNAL = 0, 1


def _write(end: End, test: SelfTest, remote: Place, rounds: int) -> np.ndarray:
    """Put half of the memory to ``remote`` and a lone signal, so often.

    Returns:
        Rounds that failed; the shortest nanoseconds of a put, and of a signal.
    """
    result = type(end.out)()
    probe = np.zeros((), dtypes["ibgda_probe"])
    probe["ibgda"] = np.frombuffer(end.fabric.ibgda or b"", np.uint8)
    probe["result"] = result.region.address
    for name, place in (("local", Place(_OUT, 0)), ("remote", remote)):
        probe[name] = np.frombuffer(bytes(place), np.uint8)
    probe["bytes"], probe["peer"], probe["rounds"] = NBYTES // 2, end.peer, rounds
    probe["signal"], probe["other_signal"] = _SIGNAL, _OTHER_SIGNAL
    probe["timeout_ns"] = int(SOON * 1e9)
    if test.on_gpu:
        error = library.epcomm_fabric_probe_ibgda(probe.ctypes.data, None)
        if error != 0:
            raise RuntimeError(f"the kernel did not start: CUDA error {error}")
        DeviceMemory.wait()
    else:
        library.epcomm_fabric_measure_ibgda(probe.ctypes.data)
    return result.read()[:24].view(np.uint64).copy()


def loopback(twin: Twin, test: SelfTest) -> str:
    """Half a MiB and signals, several times, compared at the other end; what the transport says."""
    end = End(twin, test)
    try:
        text = ""
        if twin.rank == 0:
            end.out.write(pattern(0))
            failed, put, signal = _write(end, test, Place(_IN, 0), _ROUNDS).tolist()
            end.fabric.check()
            if failed:
                raise FabricError(f"{failed} of {_ROUNDS} rounds failed without an error")
            writer = "the GPU" if test.on_gpu else "the host"
            text = f"{end.fabric.describe()}; requests by {writer}, doorbell to completion: "
            text += f"{NBYTES // 2 >> 10} KiB and a signal {put / 1e3:.1f} us, "
            text += f"a signal alone {signal / 1e3:.1f} us"
        twin.barrier()
        if twin.rank == 1:
            _compare(end)
        twin.barrier()
        return text
    finally:
        end.fabric.close()


def _compare(end: End) -> None:
    received = end.inbox.read()
    half = NBYTES // 2
    if not np.array_equal(received[:half], pattern(0)[:half]) or received[half:].any():
        raise FabricError("completed, but the bytes at the other end are wrong")
    counters = end.signals.read()[:16].view(np.uint64).tolist()
    if counters != [_ROUNDS, _ROUNDS]:
        raise FabricError(f"signals were raised to {counters}, not {[_ROUNDS, _ROUNDS]}")


def write_badly(twin: Twin, test: SelfTest, place: str) -> str:
    """A request for memory that the other end has not registered; the error it gets.

    Raises:
        FabricError: it was reported as something else, or has changed memory.
        TimeoutError: nobody reported it.
    """
    end = End(twin, test)
    try:
        text = ""
        if twin.rank == 0:
            end.out.write(pattern(0))
            failed = int(_write(end, test, BAD_PLACES[place], 1)[0])
            error = end.await_error()
            if not failed or error.status != constants["TRANSPORT"] or error.ranks != (end.peer,):
                raise error
            text = str(error)
        twin.barrier()
        if twin.rank == 1 and (end.signals.read().any() or end.inbox.read().any()):
            raise FabricError("a refused operation has changed memory")
        twin.barrier()
        return text
    finally:
        end.fabric.close()


def run_ibgda_test(test: SelfTest) -> list[Finding]:
    """What works of IBGDA on a port."""
    return run_self_test(test, loopback, write_badly, run_twins)
