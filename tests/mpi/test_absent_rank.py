"""A rank that does not come to make a Buffer: the others give up in time, and all can try again."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from harness import Case, check, make_buffer

import epcomm

TIMEOUT = 2.0
#: What a loaded machine may add to a deadline.
SLACK = 4.0
CASE = Case(1, hidden=32, experts_per_rank=2, num_topk=2, tokens=(24,))


def expect(make: Callable[[], Any], seconds: float) -> epcomm.PeerTimeoutError:
    started = time.monotonic()
    with pytest.raises(epcomm.PeerTimeoutError, match="making ") as caught:
        make()
    assert time.monotonic() - started < seconds + SLACK
    return caught.value


def test_is_named(comm):
    """The rank that comes late learns at once that the others gave up."""
    if comm.size == 1:
        pytest.skip("nobody waits")
    make_buffer(comm, CASE).close()
    for late in (0, comm.size - 1):
        comm.Barrier()
        if comm.rank == late:
            time.sleep(TIMEOUT + 1.5)
            error = expect(lambda: make_buffer(comm, CASE), 0.0)
            assert late not in error.ranks
            assert "gave up" in str(error)
        else:
            error = expect(lambda: make_buffer(comm, CASE, timeout=TIMEOUT), TIMEOUT)
            assert error.ranks == (late,)
            assert f"no sign of rank(s) {late} " in str(error)
        comm.Barrier()
        check(comm, CASE)


def test_for_the_first_buffer(comm):
    """Before the communicator is duplicated nobody can be named; what MPI began is then ended."""
    if comm.size == 1:
        pytest.skip("nobody waits")
    if comm.rank == comm.size - 1:
        comm.Barrier()
    else:
        error = expect(lambda: make_buffer(comm, CASE, timeout=TIMEOUT), TIMEOUT)
        assert "not begun" in str(error)
        comm.Barrier()
    if comm.rank == comm.size - 1:
        expect(lambda: make_buffer(comm, CASE, timeout=TIMEOUT), TIMEOUT)
    comm.Barrier()
    check(comm, CASE)
