"""The counters of csrc/host/counter.cc: waits end for every reason they should, and only for it."""

import ctypes
import mmap
import os
import signal
import threading
import time

import numpy as np
import pytest

from epcomm.native import Wait, constants, library

SIZE = constants["sizeof_counter"]
OK, TIMEOUT = constants["WAIT_OK"], constants["WAIT_TIMEOUT"]
GONE, ABORTED = constants["WAIT_PEER_GONE"], constants["WAIT_ABORTED"]


class Shared:
    """Counters in memory that forked children share."""

    def __init__(self, count: int = 2) -> None:
        self.map = mmap.mmap(-1, count * SIZE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def __getitem__(self, index: int) -> int:
        return self.start + index * SIZE


def wait(address: int, expected: int, seconds: float = 20.0, pid: int = 0, abort: int = 0) -> int:
    how = Wait(int(seconds * 1e9), pid, 0, abort)
    return library.epcomm_counter_wait(address, expected, ctypes.byref(how))


def later(seconds: float, action) -> threading.Thread:
    def run() -> None:
        time.sleep(seconds)
        action()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_add_and_read():
    counters = Shared()
    assert library.epcomm_counter_read(counters[0]) == 0
    library.epcomm_counter_add(counters[0], 3)
    library.epcomm_counter_add(counters[0], 2**40)
    assert library.epcomm_counter_read(counters[0]) == 2**40 + 3
    assert library.epcomm_counter_read(counters[1]) == 0


def test_reached_already():
    counters = Shared()
    library.epcomm_counter_add(counters[0], 5)
    assert wait(counters[0], 5, seconds=0) == OK
    assert wait(counters[0], 4, seconds=0) == OK
    assert wait(counters[0], 0, seconds=0) == OK


def test_a_waiter_wakes():
    """By the signal, much sooner than by its own look around every 20 ms on average."""
    counters = Shared()
    slow = 0
    for turn in range(20):
        sent = []

        def signal_it(sent=sent):
            sent.append(time.monotonic())
            library.epcomm_counter_add(counters[0], 1)

        thread = later(0.003, signal_it)
        assert wait(counters[0], turn + 1) == OK
        slow += time.monotonic() - sent[0] > 0.008
        thread.join()
    assert slow < 15


def test_all_waiters_wake():
    counters, results = Shared(), []
    threads = [
        threading.Thread(target=lambda: results.append(wait(counters[0], 1))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    library.epcomm_counter_add(counters[0], 1)
    for thread in threads:
        thread.join(5)
    assert results == [OK] * 8


def test_a_step_is_not_the_goal():
    """Adds that do not reach the expected value do not end the wait."""
    counters = Shared()
    threads = [
        later(0.02 * i, lambda: library.epcomm_counter_add(counters[0], 2)) for i in range(5)
    ]
    assert wait(counters[0], 9) == OK
    assert library.epcomm_counter_read(counters[0]) == 10
    for thread in threads:
        thread.join()


def test_timeout():
    counters = Shared()
    started = time.monotonic()
    assert wait(counters[0], 1, seconds=0.1) == TIMEOUT
    assert 0.1 <= time.monotonic() - started < 2.0


def test_abort():
    counters = Shared()
    thread = later(0.05, lambda: library.epcomm_counter_add(counters[1], 1))
    started = time.monotonic()
    assert wait(counters[0], 1, abort=counters[1]) == ABORTED
    assert time.monotonic() - started < 5.0
    thread.join()


def test_reached_beats_abort():
    counters = Shared()
    library.epcomm_counter_add(counters[0], 1)
    library.epcomm_counter_add(counters[1], 1)
    assert wait(counters[0], 1, abort=counters[1]) == OK


def child(action) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return pid


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "not reaped"])
def test_peer_gone(reaped):
    """Also while its parent has not asked for its exit status: it is a zombie then."""
    counters = Shared()
    pid = child(lambda: time.sleep(60))
    os.kill(pid, signal.SIGKILL)
    if reaped:
        os.waitpid(pid, 0)
    started = time.monotonic()
    assert wait(counters[0], 1, pid=pid) == GONE
    assert time.monotonic() - started < 5.0
    if not reaped:
        os.waitpid(pid, 0)


def test_living_peer_is_waited_for():
    counters = Shared()
    pid = child(lambda: (time.sleep(0.1), library.epcomm_counter_add(counters[0], 1)))
    assert wait(counters[0], 1, pid=pid) == OK
    os.waitpid(pid, 0)


def test_a_last_signal_counts():
    """What a process signalled before it ended was signalled."""
    counters = Shared()
    for turn in range(10):
        pid = child(lambda: library.epcomm_counter_add(counters[0], 1))
        assert wait(counters[0], turn + 1, pid=pid) == OK
        os.waitpid(pid, 0)


def test_no_add_is_lost_between_processes():
    counters = Shared()
    pids = [
        child(lambda: [library.epcomm_counter_add(counters[0], 1) for _ in range(5000)])
        for _ in range(4)
    ]
    seen = [library.epcomm_counter_read(counters[0])]
    while seen[-1] < 20000 and len(seen) < 10**6:
        seen.append(library.epcomm_counter_read(counters[0]))
    assert wait(counters[0], 20000) == OK
    for pid in pids:
        os.waitpid(pid, 0)
    assert library.epcomm_counter_read(counters[0]) == 20000
    assert (np.diff(np.array(seen, np.int64)) >= 0).all()


def test_sleepers_are_counted_down():
    """After waits have ended no writer makes system calls for them."""
    counters = Shared()
    assert wait(counters[0], 1, seconds=0.03) == TIMEOUT
    library.epcomm_counter_add(counters[0], 1)
    assert wait(counters[0], 1) == OK
    sleepers = np.frombuffer(counters.map, np.uint32, 1, 8)
    assert sleepers[0] == 0
