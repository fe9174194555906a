"""Faults of emulated NICs that options ask for, over either engine."""

from typing import Any

import numpy as np
import pytest
from ranks import IN, OUT, End, FileBootstrap, run_ranks
from test_conformance import TRANSPORT, await_error, pattern

from epcomm.errors import FabricError
from epcomm.fabric.abi import Place, describe_event

#: Remote access error, and what real cards' vendor codes say of it.
REFUSED_KEY = 0x13 << 8 | 0x88
NBYTES, ROUNDS = 16384, 24


def count_torn(bootstrap: FileBootstrap, transport: str, options: str) -> int:
    """Rounds in which a signal came before all of its bytes."""
    end = End(bootstrap, transport, options)
    peer, torn = 1 - end.rank, 0
    for turn in range(ROUNDS):
        end.out[:NBYTES] = pattern(NBYTES, 2 * turn + end.rank)
        end.fabric.put_signal((peer, 1), Place(IN, 0), Place(OUT, 0), NBYTES, 1)
        end.await_signal(1, turn + 1)
        torn += not np.array_equal(end.inbox[:NBYTES], pattern(NBYTES, 2 * turn + peer))
        end.fabric.flush(1, 20.0)
        bootstrap.barrier()
    end.fabric.close()
    return torn


@pytest.mark.parametrize("options", ["early_fetch=1", "slow_plane=0", "slow_plane=0 slow_us=2000"])
def test_harmless_ones_are_not_noticed(emulated, options, tmp_path):
    assert run_ranks(count_torn, 2, tmp_path, emulated, options) == [0, 0]


def test_relaxed_ordering_is_seen(emulated, tmp_path):
    """The test of the test: with such a connection signals must not be trusted."""
    torn = run_ranks(count_torn, 2, tmp_path, emulated, "relaxed=50000 seed=1")
    assert min(torn) > 0


def meet_a_refused_key(bootstrap: FileBootstrap, transport: str) -> FabricError | None:
    """Only rank 0 sends: a queue pair that has failed does not answer its peer."""
    end = End(bootstrap, transport, "bad_key=2")
    error = None
    if end.rank == 0:
        for _ in range(3):
            end.fabric.signal_add((1, 1), 5, 1)
        error = await_error(end)
    bootstrap.barrier()
    assert end.signal(5) == 2 * end.rank
    end.fabric.close()
    return error


def test_a_refused_key_is_an_error_that_names_the_peer(emulated, tmp_path):
    error, _ = run_ranks(meet_a_refused_key, 2, tmp_path, emulated)
    assert error.status == TRANSPORT
    assert error.vendor == REFUSED_KEY
    assert error.ranks == (1,)
    assert "rank 1" in str(error)
    assert "remote access error" in str(error)


def note_events(bootstrap: FileBootstrap, options: str, capacity: int) -> tuple[Any, Any]:
    """What rank 0's card tells of ``ROUNDS`` messages of its own; ends when the fabric fails."""
    end = End(bootstrap, "emulated", options)
    if capacity:
        assert end.fabric.keep_messages(capacity)
    for turn in range(ROUNDS if end.rank == 0 else 0):
        if not end.fabric.put_signal((1, turn % 2), Place(IN, 0), Place(OUT, 0), 4096, turn % 2):
            break
    if end.rank == 0 and "kill" not in options:
        for channel in (0, 1):
            end.fabric.flush(channel, 20.0)
    elif end.rank == 0:
        await_error(end)
    told = end.fabric.events()
    bootstrap.barrier()
    end.fabric.close()
    return told


def seen(told: tuple[Any, int]) -> list[tuple[Any, ...]]:
    """Events without their times."""
    return sorted(
        (
            describe_event(int(e["kind"]), int(e["code"])),
            *(int(e[name]) for name in ("channel", "position", "amount_ps")),
        )
        for e in told[0]
    )


def test_faults_are_told_and_the_same_for_the_same_seed(tmp_path):
    runs = []
    for seed in (3, 3, 4):
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        own, others = run_ranks(note_events, 2, folder, f"delay=30 seed={seed}", 1000)
        events, total = own
        assert len(events) == total
        assert others[1] == 0
        # Chunks and signals, of which a quarter meets it; the last is told however late it is.
        assert 0 < total < ROUNDS * 2
        assert {name for name, *_ in seen(own)} == {"fault: delay"}
        assert set(events["peer"].tolist()) == {1}
        assert set(events["plane"].tolist()) == {0}
        assert set(events["channel"].tolist()) <= {0, 1}
        assert events["position"].max() < ROUNDS
        assert events["amount_ps"].max() <= 30_000_000
        assert np.all(np.diff(events["time_ns"]) >= 0)
        runs.append(seen(own))
    assert runs[0] == runs[1] != runs[2]


def test_the_newest_events_are_kept_and_all_counted(tmp_path):
    (all_of, total), _ = run_ranks(note_events, 2, tmp_path, "delay=30 seed=3", 1000)
    assert len(all_of) == total > 4
    folder = tmp_path / "again"
    folder.mkdir()
    (few, counted), _ = run_ranks(note_events, 2, folder, "delay=30 seed=3", 4)
    assert len(few) == 4
    assert counted == total


def test_without_being_asked_nothing_is_told(tmp_path):
    for events, total in run_ranks(note_events, 2, tmp_path, "delay=30", 0):
        assert len(events) == total == 0


def test_a_queue_pair_that_fails_is_told(tmp_path):
    own, _ = run_ranks(note_events, 2, tmp_path, "kill=5", 1000)
    told = seen(own)
    flushed = "failed: flushed: the queue pair was in the error state"
    assert ("fault: kill queue", 0, 5, 0) in told or ("fault: kill queue", 1, 5, 0) in told
    assert flushed in {name for name, *_ in told}
    assert {name for name, *_ in told} == {"fault: kill queue", flushed}


REFUSED = {
    "early_fetch=2": '"early_fetch=2" is not one of rate=',
    "relaxed=yes": '"relaxed=yes" is not one of rate=',
    "bad_key": '"bad_key" is not one of rate=',
    "slow_us=20": "slow_us needs slow_plane=",
    "slow_plane=1": "slow_plane: expected less than planes=1, got 1",
    "dead_plane=1": "dead_plane: expected less than planes=1, got 1",
}


def open_alone(bootstrap: FileBootstrap, options: str) -> str:
    with pytest.raises(FabricError) as caught:
        End(bootstrap, "emulated", options)
    return str(caught.value)


@pytest.mark.parametrize("options", REFUSED)
def test_values_that_are_refused(options, tmp_path):
    (text,) = run_ranks(open_alone, 1, tmp_path, options)
    assert REFUSED[options] in text
