"""The live self-test of IBGDA: a card's queues filled by a kernel, or by a thread of the host.

Two ends of this process are connected with each other over one port. The first writes requests and
rings; the second one's memory must then hold the bytes, and its counters the signals and the sum of
what was added. The old values that additions bring back must be those of a counter that grows.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import FabricError
from ..fabric.abi import Place, constants, dtypes
from ..fabric.twins import Twin, run_twins
from ..native import library
from .report import Finding
from .selftest import BAD_PLACES, NBYTES, SOON, DeviceMemory, End, SelfTest, pattern, run_self_test

_OUT, _IN = 1, 2
_ROUNDS = 20
_SIGNAL, _OTHER_SIGNAL, _COUNTER = 0, 1, 2


@dataclass(frozen=True)
class _Written:
    """What the producer tells.

    Attributes:
        failed: rounds that did.
        times: by kind of request, the shortest nanoseconds of the call that writes it and rings,
            and from there to its completion: uint64 [3, 2].
        answers: what the counter held before each addition: uint64 [rounds].
    """

    failed: int
    times: np.ndarray
    answers: np.ndarray


def _write(end: End, test: SelfTest, remote: Place, rounds: int) -> _Written:
    """Put half of the memory to ``remote``, a lone signal, and add to a counter, so often."""
    result = type(end.out)()
    probe = np.zeros((), dtypes["ibgda_probe"])
    probe["ibgda"] = np.frombuffer(end.fabric.ibgda or b"", np.uint8)
    probe["result"] = result.region.address
    places = {
        "local": Place(_OUT, 0),
        "remote": remote,
        "counter": Place(constants["SIGNALS"], 8 * _COUNTER),
        "answers": Place(_IN, 0),  # nobody else writes there: the other end sends nothing
    }
    for name, place in places.items():
        probe[name] = np.frombuffer(bytes(place), np.uint8)
    probe["bytes"], probe["peer"], probe["rounds"] = NBYTES // 2, end.peer, rounds
    probe["signal"], probe["other_signal"] = _SIGNAL, _OTHER_SIGNAL
    probe["timeout_ns"], probe["adds"] = int(SOON * 1e9), end.fabric.has_atomics
    if test.on_gpu:
        error = library.epcomm_fabric_probe_ibgda(probe.ctypes.data, None)
        if error != 0:
            raise RuntimeError(f"the kernel did not start: CUDA error {error}")
        DeviceMemory.wait()
    else:
        library.epcomm_fabric_measure_ibgda(probe.ctypes.data)
    words = result.read()[:56].view(np.uint64)
    answers = end.inbox.read()[: 8 * rounds].view(np.uint64)
    return _Written(int(words[0]), words[1:].reshape(3, 2), answers)


def loopback(twin: Twin, test: SelfTest) -> str:
    """Half a MiB, signals and additions, several times, compared; what the transport says."""
    end = End(twin, test)
    try:
        text = ""
        if twin.rank == 0:
            end.out.write(pattern(0))
            written = _write(end, test, Place(_IN, 0), _ROUNDS)
            end.fabric.check()
            if written.failed:
                raise FabricError(f"{written.failed} of {_ROUNDS} rounds failed without an error")
            if end.fabric.has_atomics:
                _compare_answers(written.answers.tolist())
            writer = "the GPU" if test.on_gpu else "the host"
            text = f"{end.fabric.describe()}; requests by {writer}; {_describe(end, written.times)}"
        twin.barrier()
        if twin.rank == 1:
            _compare(end)
        twin.barrier()
        return text
    finally:
        end.fabric.close()


def _describe(end: End, times: np.ndarray) -> str:
    """The times of each kind of request."""
    kinds = [f"{NBYTES // 2 >> 10} KiB and a signal", "a signal alone", "an atomic"]
    texts = [
        f"{kind} {completion / 1e3:.1f} (written and rung in {call / 1e3:.1f})"
        for kind, (call, completion) in zip(kinds, times.tolist(), strict=True)
    ]
    if not end.fabric.has_atomics:
        texts[-1] = "no atomics: the card has none"
    return "us from doorbell to completion: " + ", ".join(texts)


def _compare_answers(answers: list[int]) -> None:
    """Each addition waited for the one before."""
    if answers != list(range(_ROUNDS)):
        raise FabricError(
            f"additions of 1 brought back {answers}, not the old values 0 to {_ROUNDS - 1}"
        )


def _compare(end: End) -> None:
    received = end.inbox.read()
    half = NBYTES // 2
    if not np.array_equal(received[:half], pattern(0)[:half]) or received[half:].any():
        raise FabricError("completed, but the bytes at the other end are wrong")
    *signals, total = end.signals.read()[:24].view(np.uint64).tolist()
    if signals != [_ROUNDS, _ROUNDS]:
        raise FabricError(f"signals were raised to {signals}, not {[_ROUNDS, _ROUNDS]}")
    expected = _ROUNDS if end.fabric.has_atomics else 0
    if total != expected:
        raise FabricError(f"additions of 1 came to {total}, not {expected}")


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
            failed = _write(end, test, BAD_PLACES[place], 1).failed
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
