"""Timelines as Chrome traces, which ui.perfetto.dev and chrome://tracing show.

``Buffer.timeline`` makes the trace of one rank, ``merge`` one of all ranks;
``python -m epcomm.timeline INTO FILE...`` merges files.

Clocks. A rank's times are by one clock: with backend "cuda" its GPU's timer, else its host's
monotonic clock. ``merge`` brings them to the clock of rank 0's host:

- Ranks on one GPU, and on one host with backend "cpu", have the same clock: nothing is estimated.
- Another GPU's timer is compared with its host's clock when the trace is made, by reading the
  host's before and after; the pair is wrong by at most half of what lay between, some microseconds.
- Another host's clock is compared with rank 0's when the Buffer is made, by messages; it is wrong
  by at most half a round trip, tens to hundreds of microseconds, and by what the clocks have
  drifted apart since.

What the comparisons may be wrong by stands in the trace (``Trace.ranks[i]["clock"]``). Read the
order of events on different GPUs or hosts with that in mind.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .trace_events import JsonObject, name_process, note_loss

#: Messages of network cards that a rank keeps, and events.
MAX_MESSAGES = 1 << 14
#: Keys of a rank in "otherData".
_LOST = {"spans": "spans", "messages": "messages", "events": "events of network cards"}
_RANK_KEYS = (
    *("rank", "node", "local_rank", "not_shown", "clock"),
    *(f"lost_{what}" for what in _LOST),
)


@dataclass(frozen=True)
class Lost:
    """How many older notes newer ones wrote over."""

    spans: int = 0
    messages: int = 0
    events: int = 0


@dataclass(frozen=True)
class Clock:
    """How a rank's nanoseconds compare with others'.

    Attributes:
        domain: the same for ranks that have one clock.
        ns: a moment by it.
        host_ns: the same moment by the host's monotonic clock.
        error_ns: what the pair may be wrong by.
        host_offset_ns: the host's clock minus that of rank 0's host.
        host_error_ns: what that may be wrong by, without drift.
    """

    domain: str
    ns: int = 0
    host_ns: int = 0
    error_ns: int = 0
    host_offset_ns: int = 0
    host_error_ns: int = 0

    def to_common(self) -> int:
        """What to add to this clock's times to have those of rank 0's host."""
        return self.host_ns - self.ns - self.host_offset_ns


class Trace:
    """A timeline.

    Attributes:
        data: what the JSON file holds: ``traceEvents`` (times in microseconds since ``base_ns``)
            and ``otherData`` with ``base_ns`` and, for each rank, who it is, what was lost, what is
            not shown, its clock, and whether its network is modelled.
    """

    def __init__(self, data: JsonObject) -> None:
        self.data = _checked(data, "trace")

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read a trace that ``save`` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not such a trace.
        """
        try:
            data = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        return cls(_checked(data, str(path)))

    def save(self, path: str | Path) -> None:
        """Write Chrome JSON.

        Raises:
            OSError: the file cannot be written.
        """
        Path(path).write_text(json.dumps(self.data))

    @property
    def events(self) -> list[JsonObject]:
        """The events, in the Trace Event Format."""
        events: list[JsonObject] = self.data["traceEvents"]
        return events

    @property
    def ranks(self) -> list[JsonObject]:
        """What is known of each rank."""
        ranks: list[JsonObject] = self.data["otherData"]["ranks"]
        return ranks

    @property
    def lost(self) -> int:
        """Spans, messages and events of network cards that newer ones wrote over."""
        return sum(rank[f"lost_{what}"] for rank in self.ranks for what in _LOST)


def make_trace(
    events: Sequence[JsonObject],
    base: int,
    clock: Clock,
    *,
    rank: int,
    node: int,
    local_rank: int,
    lost: Lost = Lost(),
    not_shown: Sequence[str] = (),
    modelled: bool = False,
) -> Trace:
    """One rank's trace.

    Args:
        events: of trace_events, times since ``base``.
        base: nanoseconds by ``clock``.
        clock: the rank's.
        rank: whose.
        node: its node.
        local_rank: its place in the node.
        lost: what is missing in it.
        not_shown: what a reader might look for in vain, in words.
        modelled: whether what is called a network is a model, so that nobody takes its times for
            a real one's.
    """
    network = ", modelled network" if modelled else ""
    who = f"rank {rank} (node {node}, local rank {local_rank}{network})"
    all_events = [name_process(rank, who), *events]
    counts = asdict(lost)
    for what, words in _LOST.items():
        if counts[what]:
            all_events.append(note_loss(rank, counts[what], words))
    about = {
        "rank": rank,
        "node": node,
        "local_rank": local_rank,
        **{f"lost_{what}": count for what, count in counts.items()},
        "not_shown": list(not_shown),
        "clock": asdict(clock),
        "modelled_network": modelled,
    }
    return Trace(
        {
            "traceEvents": all_events,
            "displayTimeUnit": "ns",
            "otherData": {"base_ns": base, "ranks": [about]},
        }
    )


def merge(traces: Sequence["Trace | str | Path"]) -> Trace:
    """One trace of several ranks', by the clock of rank 0's host, with the flights of chunks.

    A flight goes from the beginning of a chunk's put to the end of the first wait for it.

    Args:
        traces: one of each rank, or the files that hold them.

    Raises:
        OSError: a file cannot be read.
        TypeError: neither a Trace nor a path.
        ValueError: none, not a trace, or two of one rank.
    """
    if isinstance(traces, Trace | str | Path):
        raise TypeError("traces: expected a sequence of traces or paths, got a single one")
    loaded = [_loaded(trace) for trace in traces]
    if not loaded:
        raise ValueError("traces: expected at least one, got none")
    ranks = [rank for trace in loaded for rank in trace.ranks]
    numbers = [rank["rank"] for rank in ranks]
    if len(loaded) != len(ranks):
        raise ValueError("traces: expected traces of one rank each, got one that is merged")
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise ValueError(f"traces: expected one of each rank, got several of ranks {twice}")
    # One comparison for all ranks of a domain: among themselves none is needed.
    to_common: dict[str, int] = {}
    starts = []
    for trace, rank in zip(loaded, ranks, strict=True):
        clock = Clock(**rank["clock"])
        add = to_common.setdefault(clock.domain, clock.to_common())
        starts.append(trace.data["otherData"]["base_ns"] + add)
    base = min(starts)
    events: list[JsonObject] = []
    for trace, start in zip(loaded, starts, strict=True):
        shift = (start - base) / 1e3
        events += [
            {**event, "ts": event["ts"] + shift} if "ts" in event else event
            for event in trace.events
        ]
    return Trace(
        {
            "traceEvents": [*events, *_flights(events, ranks)],
            "displayTimeUnit": "ns",
            "otherData": {"base_ns": base, "ranks": ranks},
        }
    )


def _loaded(trace: Any) -> Trace:
    if isinstance(trace, Trace):
        return trace
    if isinstance(trace, str | Path):
        return Trace.load(trace)
    raise TypeError(f"traces: expected a Trace or a path, got {type(trace).__name__}")


def _checked(data: Any, name: str) -> JsonObject:
    """Raise ValueError if this is not what ``make_trace`` or ``merge`` made."""
    other = data.get("otherData") if isinstance(data, dict) else None
    good = (
        isinstance(other, dict)
        and isinstance(data.get("traceEvents"), list)
        and isinstance(other.get("base_ns"), int)
        and isinstance(other.get("ranks"), list)
        and all(isinstance(r, dict) and set(_RANK_KEYS) <= set(r) for r in other["ranks"])
    )
    if not good:
        raise ValueError(f"{name}: expected a trace that epcomm wrote, got other data")
    checked: JsonObject = data
    return checked


def _flights(events: list[JsonObject], ranks: list[JsonObject]) -> list[JsonObject]:
    """From the put of a chunk to the first end of a wait for it."""
    at = {(r["node"], r["local_rank"]): r["rank"] for r in ranks}
    by_rank = {r["rank"]: r for r in ranks}
    puts: dict[tuple[int, int, int, int], JsonObject] = {}
    arrivals: dict[tuple[int, int, int, int], float] = {}
    for event in events:
        if event["name"] not in ("put", "wait"):
            continue
        own, details = by_rank[event["pid"]], event["args"]
        other = at.get((details["node"], own["local_rank"]))
        if other is None:
            continue
        call, chunk, end = details["call"], details["chunk"], event["ts"] + event["dur"]
        if event["name"] == "put":
            puts[call, own["rank"], other, chunk] = event
        else:
            flight = (call, other, own["rank"], chunk)
            arrivals[flight] = min(end, arrivals.get(flight, end))
    flights: list[JsonObject] = []
    for number, key in enumerate(sorted(puts.keys() & arrivals.keys())):
        put = puts[key]
        details = put["args"]
        same = {
            "cat": "flight", "id": f"flight {number}", "pid": key[1], "tid": 0,
            "name": f"chunks to rank {key[2]}, channel {details['channel']}, "
                    f"plane {details['plane']}",
        }  # fmt: skip
        flights += [
            {**same, "ph": "b", "ts": put["ts"], "args": details},
            {**same, "ph": "e", "ts": max(put["ts"], arrivals[key])},
        ]
    return flights


def _main(arguments: Sequence[str]) -> None:
    if len(arguments) < 2:
        raise SystemExit("usage: python -m epcomm.timeline INTO FILE...")
    trace = merge(arguments[1:])
    trace.save(arguments[0])
    ranks = [rank["rank"] for rank in trace.ranks]
    sys.stdout.write(f"{arguments[0]}: ranks {ranks}, {trace.lost} events lost\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
