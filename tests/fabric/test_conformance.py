"""What every transport must do alike: one list, run over each of them."""

import os
import signal
import time
from typing import Any

import numpy as np
import pytest
from conftest import Transport
from ranks import IN, NUM_SIGNALS, OUT, REGION_BYTES, End, FileBootstrap, run_ranks

from epcomm.errors import FabricError
from epcomm.fabric.abi import Place, constants

#: Codes of failed operations, the numbers of verbs' work completions.
REMOTE_ACCESS, RETRIES_EXCEEDED = 10, 12
TRANSPORT, BAD_TRIGGER = constants["TRANSPORT"], constants["BAD_TRIGGER"]
#: Seconds in which an error must have come; the list's transports give up after 0.1 s.
SOON = 20.0
#: Sizes around those that travel inside a request, of several packets, and of so many that a signal
#: that overtakes them is seen.
SIZES = (16, 32, 64, 80, 4112, 65536 + 48, 1 << 19)


def pattern(nbytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng([nbytes, seed]).integers(0, 256, nbytes, np.uint8)


def await_error(end: End) -> FabricError:
    """The fabric's error, once it has one."""
    deadline = time.monotonic() + SOON
    while time.monotonic() < deadline:
        try:
            end.fabric.check()
        except FabricError as error:
            return error
        time.sleep(0.001)
    raise AssertionError("no error came")


def exchange_writes(bootstrap: FileBootstrap, transport: Transport) -> None:
    end = End(bootstrap, transport.name, transport.arguments)
    peer = 1 - end.rank
    offset = 0
    for turn, nbytes in enumerate(SIZES):
        end.out[offset : offset + nbytes] = pattern(nbytes, end.rank)
        place = Place(IN, offset + 32)
        if turn % 2:
            end.fabric.put((peer, 1), place, Place(OUT, offset), nbytes)
            end.fabric.signal_add((peer, 1), 1, 1)
        else:
            end.fabric.put_signal((peer, 1), place, Place(OUT, offset), nbytes, 1)
        end.await_signal(1, turn + 1)
        got = end.inbox[offset + 32 : offset + 32 + nbytes]
        np.testing.assert_array_equal(got, pattern(nbytes, peer))
        assert not end.inbox[offset + 32 + nbytes : offset + 64 + nbytes].any()
        offset += nbytes + 32
    end.fabric.flush(1, SOON)
    bootstrap.barrier()
    end.fabric.close()


def test_bytes_arrive_before_their_signal(transport, tmp_path):
    run_ranks(exchange_writes, 2, tmp_path, transport)


def add_signals(bootstrap: FileBootstrap, transport: Transport) -> list[int]:
    end = End(bootstrap, transport.name, transport.arguments)
    peer = 1 - end.rank
    nothing = Place(IN, 0)
    for value in (1, 7, 0, 1 << 40):
        end.fabric.signal_add((peer, 0), 5, value)
    for _ in range(3):
        end.fabric.put_signal((peer, 0), nothing, nothing, 0, NUM_SIGNALS - 1)
    end.fabric.put((peer, 0), nothing, nothing, 0)
    end.fabric.flush(0, SOON)
    end.await_signal(5, 8 + (1 << 40))
    end.await_signal(NUM_SIGNALS - 1, 3)
    bootstrap.barrier()
    values = [end.signal(i) for i in range(NUM_SIGNALS)]
    assert not end.inbox.any()
    end.fabric.close()
    return values


def test_signals_are_64_bit_sums(transport, tmp_path):
    """Also of a put without bytes; no other counter moves."""
    expected = [0] * NUM_SIGNALS
    expected[5], expected[-1] = 8 + (1 << 40), 3
    assert run_ranks(add_signals, 2, tmp_path, transport) == [expected] * 2


def flood(bootstrap: FileBootstrap, transport: Transport, count: int, depth: int) -> None:
    arguments = transport.arguments + (f" depth={depth}" if transport.is_verbs else "")
    if transport.is_direct:
        # Its queues are long: they fill up where nothing completes for a while.
        count, arguments = 600, "latency_ns=20000000"
    end = End(bootstrap, transport.name, arguments, num_slots=32, max_in_flight=8)
    nbytes, channels = 1024, 4
    end.out[:] = pattern(REGION_BYTES, end.rank)
    others = [node for node in range(end.size) if node != end.rank]
    puts = []
    for turn in range(count):
        for peer in others:
            for channel in range(channels):
                local = (turn * 16 + channel * 4096) % (REGION_BYTES - nbytes) // 16 * 16
                slot = end.rank * channels + channel
                place = Place(IN, slot * nbytes)
                puts.append(((peer, channel), place, Place(OUT, local), nbytes, slot))
    end.put_signals(puts)
    for channel in range(channels):
        end.fabric.flush(channel, SOON)
    bootstrap.barrier()
    for source in others:
        bytes_of_source = pattern(REGION_BYTES, source)
        for channel in range(channels):
            slot = source * channels + channel
            end.await_signal(slot, count)
            assert end.signal(slot) == count
            local = ((count - 1) * 16 + channel * 4096) % (REGION_BYTES - nbytes) // 16 * 16
            got = end.inbox[slot * nbytes : (slot + 1) * nbytes]
            np.testing.assert_array_equal(got, bytes_of_source[local : local + nbytes])
    bootstrap.barrier()
    end.fabric.close()


@pytest.mark.parametrize("depth", [1, 16])
def test_more_operations_than_queues_hold(transport, depth, tmp_path):
    """Nothing is lost, doubled or reordered where rings, queue pairs and lanes fill up."""
    run_ranks(flood, 3, tmp_path, transport, 60, depth)


BAD_PLACES = {
    "region the peer lacks": (Place(5, 0), Place(OUT, 0), 64, 0),
    "past the end of the region": (Place(IN, REGION_BYTES - 16), Place(OUT, 0), 64, 0),
    "far past the end": (Place(IN, REGION_BYTES * 64), Place(OUT, 0), 8192, 0),
    "signal the peer lacks": (Place(IN, 0), Place(OUT, 0), 64, 4 * NUM_SIGNALS),
}


def put_badly(
    bootstrap: FileBootstrap, transport: Transport, bad: tuple[Place, Place, int, int]
) -> Any:
    end = End(bootstrap, transport.name, transport.arguments)
    if end.rank == 1:
        bootstrap.barrier()
        end.fabric.close()
        assert not end.inbox[64:].any()
        return None
    remote, local, nbytes, signal_index = bad
    lane = (1, 2)
    # Good ones before: their completions must not be taken for the bad one's.
    for _ in range(3):
        end.fabric.put_signal(lane, Place(IN, 0), Place(OUT, 0), 64, 0)
    end.fabric.flush(2, SOON)
    ticket = end.fabric.put_signal(lane, remote, local, nbytes, signal_index)
    error = await_error(end)
    # Later calls, and waits in the same ring, end at once with the first failure.
    started = time.monotonic()
    assert end.fabric.put(lane, Place(IN, 0), Place(OUT, 0), 16) == 0
    assert not end.fabric.done(2, ticket)
    assert not end.fabric.done(2, 0)
    for channel in (2, 0):
        with pytest.raises(FabricError, match=r"remote access|signal|region|place"):
            end.fabric.flush(channel, SOON)
    assert time.monotonic() - started < SOON / 2
    bootstrap.barrier()
    started = time.monotonic()
    end.fabric.close()
    assert time.monotonic() - started < SOON / 2
    return error.status, error.vendor, error.ranks, str(error)


@pytest.mark.parametrize("bad", BAD_PLACES)
def test_bad_place_at_the_peer_is_a_remote_access_error(transport, bad, tmp_path):
    result, _ = run_ranks(put_badly, 2, tmp_path, transport, BAD_PLACES[bad])
    status, vendor, ranks, text = result
    if transport.is_direct and bad == "signal the peer lacks":
        # Kernels know how many there are: as many as here.
        assert (status, vendor, ranks) == (BAD_TRIGGER, 0, (1,)), text
    else:
        assert (status, transport.status(vendor), ranks) == (TRANSPORT, REMOTE_ACCESS, (1,)), text
    assert "channel 2" in text
    if transport.is_verbs:
        assert "remote access error" in text
        assert "status 10, vendor code 0x" in text


def put_from_nowhere(bootstrap: FileBootstrap, transport: Transport) -> Any:
    end = End(bootstrap, transport.name, transport.arguments)
    bootstrap.barrier()
    result = None
    if end.rank == 0:
        end.fabric.put((1, 0), Place(IN, 0), Place(OUT, REGION_BYTES), 64)
        result = await_error(end).status
    bootstrap.barrier()
    end.fabric.close()
    return result


def test_bad_local_place_is_refused_before_it_is_sent(transport, tmp_path):
    assert run_ranks(put_from_nowhere, 2, tmp_path, transport) == [BAD_TRIGGER, None]


def put_to_the_dead(bootstrap: FileBootstrap, transport: Transport) -> Any:
    end = End(bootstrap, transport.name, transport.arguments)
    end.fabric.put_signal((1 - end.rank, 0), Place(IN, 0), Place(OUT, 0), 4096, 0)
    end.await_signal(0, 1)
    bootstrap.barrier()
    if end.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    # Until the last thread of the peer has ended, its memory takes what is written.
    ticket = 1
    while ticket and time.monotonic() - started < SOON:
        ticket = end.fabric.put_signal((1, 0), Place(IN, 0), Place(OUT, 0), 65536, 0)
        time.sleep(0.01)
    error = await_error(end)
    with pytest.raises(FabricError):
        end.fabric.flush(0, SOON)
    end.fabric.close()
    assert time.monotonic() - started < SOON
    return error.status, error.vendor, error.ranks, str(error)


def test_killed_peer_is_an_error_in_bounded_time(transport, tmp_path):
    result, _ = run_ranks(put_to_the_dead, 2, tmp_path, transport, killed=(1,))
    status, vendor, ranks, text = result
    assert (status, transport.status(vendor), ranks) == (TRANSPORT, RETRIES_EXCEEDED, (1,)), text


def close_under_way(bootstrap: FileBootstrap, transport: Transport) -> float:
    end = End(bootstrap, transport.name, transport.arguments)
    bootstrap.barrier()
    for channel in range(4):
        for _ in range(8):
            end.fabric.put_signal((1 - end.rank, channel), Place(IN, 0), Place(OUT, 0), 65536, 0)
    started = time.monotonic()
    end.fabric.close()
    return time.monotonic() - started


def test_closing_with_operations_under_way_ends(transport, tmp_path):
    """Both sides at once, so that each may find the other's end gone."""
    assert max(run_ranks(close_under_way, 2, tmp_path, transport)) < SOON
