"""A measurement that fails on one rank is given up by all, and the next one runs."""

import pytest

from benchmarks.gpu.lockstep import Lockstep


@pytest.mark.parametrize("failing", ["one", "all"])
def test_failure_is_everyones_and_work_goes_on(comm, failing, capfd):
    lockstep = Lockstep(comm)
    last = comm.size - 1

    def fails():
        if failing == "all" or comm.rank == last:
            raise ValueError(f"no luck on {comm.rank}")

    assert lockstep.attempt("first", lambda: None)
    assert not lockstep.attempt("second", fails)
    printed = capfd.readouterr()
    assert ("second: not measured" in printed.out) == (comm.rank == 0)
    assert comm.rank != 0 or f"ranks [{last}]: ValueError: no luck on {last}" in printed.out
    # One rank shows where it happened.
    first = 0 if failing == "all" else last
    assert ("Traceback" in printed.err) == (comm.rank == first)
    assert lockstep.attempt("third", lambda: None)


def test_messages_left_over_by_a_failed_step_disturb_nobody(comm):
    if comm.size == 1:
        pytest.skip("needs 2 ranks")
    lockstep = Lockstep(comm)

    def sends_but_never_receives():
        if comm.rank == 0:
            comm.isend("stale", dest=1, tag=0)
            raise ValueError("gone")

    assert not lockstep.attempt("step", sends_but_never_receives)
    assert lockstep.attempt("next", lambda: None)
    if comm.rank == 1:
        assert comm.recv(source=0, tag=0) == "stale"
