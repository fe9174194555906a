"""The CPU back end over a fabric: the same bytes as the oracle's, and ends in bounded time."""

import gc
import time
from pathlib import Path

import pytest
import torch
from harness import Case, check, draw_inputs, make_buffer

import epcomm

FABRIC = "proxy/local"
#: World sizes and ranks per node: 2x4, 4x2, 2x3, 3x1, and one node.
SHAPES = [(8, 4), (8, 2), (6, 3), (3, 1), (2, 2)]
CASES = {
    "bf16": {},
    "fp8 to experts": {"quantize": "fp8", "layout": "expert", "alignment": 8},
    "packed, no tokens on some ranks": {"packed": "ue8m0", "hidden": 256, "tokens": (0, 33, 1)},
    "skewed, logfmt": {"routing": "skewed", "hidden": 256, "wire": "logfmt10"},
    "float32": {"dtype": torch.float32, "routing": "sparse", "num_bias": 1, "row_weights": True},
}
TIMEOUT = 2.0
SLACK = 6.0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("size", "shape"), SHAPES)
def test_oracle_equality(world, size, shape, name):
    comm = world(size)
    check(comm, Case(shape, **CASES[name]), fabric=FABRIC)


def test_many_calls_reuse_slots(world):
    """Places are used again in every call; a rank that runs ahead must not overwrite one in use."""
    comm = world(4)
    case = Case(2, tokens=(13, 40))
    with make_buffer(comm, case, fabric=FABRIC) as buffer:
        for turn in range(12):
            time.sleep(0.01 * ((comm.rank + turn) % 3 == 0))
            check(comm, Case(2, tokens=(13, 40), seed=turn), buffer)
        mine = draw_inputs(case, comm.size)[comm.rank]
        topk_idx = mine.topk_idx + (10**6 if comm.rank == 3 else 0)
        for _ in range(3):
            with pytest.raises(ValueError if comm.rank == 3 else epcomm.PeerError):
                buffer.dispatch(mine.x, topk_idx)
        check(comm, case, buffer)


def test_two_buffers_do_not_meet(world):
    comm = world(4)
    case = Case(2)
    with make_buffer(comm, case, fabric=FABRIC) as one, make_buffer(comm, case) as two:
        check(comm, case, one)
        check(comm, case, two)
        with make_buffer(comm, case, fabric=FABRIC) as three:
            check(comm, case, three)
            check(comm, case, one)


def proxy_threads():
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum(name.startswith("epcomm-proxy") for name in names)


def test_threads_end_with_the_buffer(world):
    """Closed, with results still in use, or dropped together with them."""
    comm = world(2)
    case = Case(1)
    gc.collect()  # buffers of earlier tests
    before = proxy_threads()
    mine = draw_inputs(case, comm.size)[comm.rank]
    for close in (True, False):
        buffer = make_buffer(comm, case, fabric=FABRIC)
        assert proxy_threads() == before + 1
        result = buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
        kept = result.x.clone()
        if close:
            buffer.close()
            assert torch.equal(result.x, kept)
        del buffer, result
        gc.collect()
        assert proxy_threads() == before


def test_silent_rank_is_named_on_every_rank(world):
    """Through abort messages over the fabric where nobody waits for it directly."""
    comm = world(4)
    case, silent = Case(2), 3
    buffer = make_buffer(comm, case, fabric=FABRIC, timeout=TIMEOUT)
    check(comm, case, buffer)
    comm.Barrier()
    if comm.rank != silent:
        mine = draw_inputs(case, comm.size)[comm.rank]
        started = time.monotonic()
        with pytest.raises(epcomm.PeerTimeoutError) as caught:
            buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
        assert time.monotonic() - started < TIMEOUT + SLACK
        assert caught.value.ranks == (silent,), str(caught.value)
        with pytest.raises(epcomm.BufferClosedError):
            buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
    comm.Barrier()
    buffer.close()
    check(comm, case, fabric=FABRIC)


def test_fabric_that_fails_on_one_rank(world):
    """That rank says why; all others name it, long before a deadline, whatever their node."""
    comm = world(4)
    case, failing = Case(2), 3
    buffer = make_buffer(comm, case, fabric=FABRIC, timeout=60.0)
    check(comm, case, buffer)
    comm.Barrier()
    mine = draw_inputs(case, comm.size)[comm.rank]
    if comm.rank == failing:
        # The others wait already: its rail peer for its message, the rail peer's node peer for the
        # rail peer's counter. A signal to itself: the proxy thread refuses it and stops.
        time.sleep(0.5)
        buffer._backend.node.scale_out._fabric.signal_add((1, 0), 0, 1)
    started = time.monotonic()
    expected = epcomm.FabricError if comm.rank == failing else epcomm.PeerTimeoutError
    with pytest.raises(expected) as caught:
        [buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights) for _ in range(2)]
    assert time.monotonic() - started < 15.0
    if comm.rank == failing:
        assert "peer 1 is not another node" in str(caught.value)
    else:
        assert caught.value.ranks == (failing,), str(caught.value)
    with pytest.raises(epcomm.BufferClosedError):
        buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
    comm.Barrier()
    buffer.close()
    check(comm, case, fabric=FABRIC)


def test_unknown_fabric_is_refused_everywhere(world):
    comm = world(2)
    with pytest.raises(ValueError, match="proxy/local"):
        make_buffer(comm, Case(1), fabric="proxy/pigeon")
    with pytest.raises(epcomm.MismatchError, match="fabric"):
        make_buffer(comm, Case(1), fabric="mpi" if comm.rank else FABRIC)


def test_memory_that_cannot_be_registered(world, monkeypatch):
    """Construction fails on every rank, with the reason, when one cannot register its memory."""
    comm = world(2)
    from epcomm.cpu import scaleout_fabric

    real = scaleout_fabric.RegionMemory

    def without_file(address, nbytes, keep, fd):
        return real(address, nbytes, keep, -1)

    if comm.rank == 1:
        monkeypatch.setattr(scaleout_fabric, "RegionMemory", without_file)
    with pytest.raises(epcomm.FabricError if comm.rank == 1 else epcomm.PeerError, match="memfd"):
        make_buffer(comm, Case(1), fabric=FABRIC)
    monkeypatch.undo()
    check(comm, Case(1), fabric=FABRIC)
