"""A rank that stops calling: the others give up in time, on the right rank, and can start anew."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from harness import Case, check, draw_inputs, make_buffer, nodes_of

import epcomm

TIMEOUT = 2.0
#: What a loaded machine may add to a deadline.
SLACK = 4.0


def case_of(shape: int) -> Case:
    return Case(shape, hidden=32, experts_per_rank=2, num_topk=2, tokens=(24,))


def dispatch(comm: Any, case: Case, buffer: epcomm.Buffer) -> epcomm.DispatchResult:
    given = draw_inputs(case, comm.size)[comm.rank]
    return buffer.dispatch(given.x, given.topk_idx, given.topk_weights)


def expect_timeout(call: Callable[[], Any], silent: int) -> str:
    started = time.monotonic()
    with pytest.raises(epcomm.PeerTimeoutError) as caught:
        call()
    elapsed = time.monotonic() - started
    assert elapsed < TIMEOUT + SLACK
    assert caught.value.ranks == (silent,), str(caught.value)
    assert f"rank {silent} " in str(caught.value)
    return str(caught.value)


def expect_unusable(comm: Any, case: Case, buffer: epcomm.Buffer) -> None:
    with pytest.raises(epcomm.BufferClosedError, match="new Buffer"):
        dispatch(comm, case, buffer)


def silent_rank(shape: int, size: int) -> int:
    """Another place in its node for every shape: first, middle, last."""
    return {1: size // 2, size: 0}.get(shape, size - 1)


def shapes_of(size: int) -> list[int]:
    """One node, ranks alone, and the shape between them."""
    shapes = nodes_of(size)
    return sorted({shapes[0], shapes[len(shapes) // 2], shapes[-1]})


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_others_name_the_silent_rank(comm, operation):
    """Also those that wait for it only through ranks of its node or of theirs."""
    if comm.size == 1:
        pytest.skip("nobody waits")
    shapes = shapes_of(comm.size)
    for shape in shapes if operation == "dispatch" else shapes[len(shapes) // 2 :][:1]:
        case, silent = case_of(shape), silent_rank(shape, comm.size)
        buffer = make_buffer(comm, case, timeout=TIMEOUT)
        recv = dispatch(comm, case, buffer)
        comm.Barrier()

        def call(buffer=buffer, case=case, recv=recv):
            if operation == "dispatch":
                return dispatch(comm, case, buffer)
            return buffer.combine(recv.x, recv.handle)

        if comm.rank != silent:
            # Whoever waits for it directly starts later: the others' deadlines come first.
            time.sleep(0.3 if comm.rank % shape == silent % shape else 0.0)
            message = expect_timeout(call, silent)
            assert operation in message
            assert "call 2" in message
            assert "announce" in message
            expect_unusable(comm, case, buffer)
        comm.Barrier()
        if comm.rank == silent:
            # It comes late: the others are gone, and it must not wait for them.
            started = time.monotonic()
            with pytest.raises(epcomm.PeerTimeoutError):
                call()
            assert time.monotonic() - started < TIMEOUT + SLACK
            expect_unusable(comm, case, buffer)
        buffer.close()
        check(comm, case)


def test_rank_that_raises_in_its_own_code(comm):
    """An exception between two calls leaves the buffer closed there, and the others in time."""
    if comm.size == 1:
        pytest.skip("nobody waits")
    case, raising = case_of(comm.size), comm.size - 1

    def work() -> None:
        with make_buffer(comm, case, timeout=TIMEOUT) as buffer:
            dispatch(comm, case, buffer)
            if comm.rank == raising:
                raise ZeroDivisionError
            dispatch(comm, case, buffer)

    started = time.monotonic()
    with pytest.raises(ZeroDivisionError if comm.rank == raising else epcomm.PeerTimeoutError):
        work()
    assert time.monotonic() - started < 2 * TIMEOUT + SLACK
    check(comm, case)


@pytest.mark.parametrize("step", ["_move", "_arrive"])
def test_failure_in_the_middle_of_a_call(comm, monkeypatch, step):
    """A rank that fails after the announcements ends the waits of all, long before a deadline."""
    if comm.size == 1:
        pytest.skip("nobody waits")
    from epcomm.cpu.dispatch import Dispatch

    for shape in shapes_of(comm.size):
        case, failing = case_of(shape), silent_rank(shape, comm.size)
        buffer = make_buffer(comm, case, timeout=30.0)
        comm.Barrier()
        started = time.monotonic()
        if comm.rank == failing:
            with monkeypatch.context() as patch:
                patch.setattr(Dispatch, step, lambda *_: 1 // 0)
                with pytest.raises(ZeroDivisionError):
                    dispatch(comm, case, buffer)
        else:
            with pytest.raises(epcomm.PeerTimeoutError) as caught:
                # Whoever needed nothing from it learns of it in the next call.
                [dispatch(comm, case, buffer) for _ in range(2)]
            assert caught.value.ranks == (failing,), str(caught.value)
        assert time.monotonic() - started < 10.0
        expect_unusable(comm, case, buffer)
        buffer.close()
        check(comm, case)


def test_a_slow_rank_is_not_silent(comm):
    """Ranks that come late, each by less than the timeout, are waited for."""
    for shape in (1, comm.size):
        case = case_of(shape)
        with make_buffer(comm, case, timeout=TIMEOUT) as buffer:
            comm.Barrier()
            time.sleep(0.4 if comm.rank == 0 else 0.0)
            check(comm, case, buffer)


def test_memory_that_cannot_be_shared(comm, monkeypatch):
    """Construction fails on every rank when one rank cannot map a peer's memory."""
    if comm.size == 1:
        pytest.skip("nothing is shared")
    from epcomm.cpu.segments import Segment

    def refuse(pid: int, fd: int, nbytes: int) -> Segment:
        raise OSError(13, "cannot map")

    case, bad_rank = case_of(comm.size), comm.size - 1
    with monkeypatch.context() as patch:
        if comm.rank == bad_rank:
            patch.setattr(Segment, "open_peer", refuse)
        with pytest.raises(OSError if comm.rank == bad_rank else epcomm.PeerError) as caught:
            make_buffer(comm, case)
    assert "cannot map" in str(caught.value)
    if comm.rank != bad_rank:
        assert caught.value.ranks == (bad_rank,)
    check(comm, case)
