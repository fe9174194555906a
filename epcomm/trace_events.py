"""Events of a Chrome trace: of one rank's spans, and of what its network cards carried.

Times are nanoseconds of some clock; ``base`` is the moment that becomes 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .fabric.abi import describe_event

JsonObject = dict[str, Any]

#: Thread numbers of a rank's tracks: a block has 64, its warps and itself; cards come after them.
_THREADS_OF_BLOCK = 64
_CALLS = 0
_CARDS = 1 << 20
#: What a warp does within a role.
_WITHIN = ("put", "credit", "wait")


@dataclass(frozen=True)
class Span:
    """Something that one thread of the host did.

    Attributes:
        begin, end: nanoseconds.
        name: what.
        call: number of the call, the same on all ranks.
    """

    begin: int
    end: int
    name: str
    call: int


@dataclass(frozen=True)
class Channels:
    """Which channel a chunk travels on, and which of the rank's network cards, its planes.

    Attributes:
        num_channels: chunk c of a call takes channel c % held_chunks % num_channels.
        held_chunks: places for chunks of a peer; 0: for all of a call.
        num_planes: channel c belongs to plane c % num_planes.
    """

    num_channels: int = 1
    held_chunks: int = 0
    num_planes: int = 1

    def of(self, chunk: int) -> tuple[int, int]:
        """(channel, plane)."""
        place = chunk % self.held_chunks if self.held_chunks else chunk
        channel = place % self.num_channels
        return channel, channel % self.num_planes


def unroll(spans_BC: np.ndarray, counts_B: np.ndarray) -> tuple[np.ndarray, int]:
    """Spans of all blocks' rings, and how many older ones were written over.

    Args:
        spans_BC: ``epcomm_cuda_span``, structured array [blocks, capacity].
        counts_B: spans noted by each block.
    """
    capacity = spans_BC.shape[1]
    kept = np.minimum(counts_B, capacity).astype(np.int64)
    spans = np.concatenate([ring[:count] for ring, count in zip(spans_BC, kept, strict=True)])
    return spans[np.argsort(spans["begin"], kind="stable")], int(counts_B.sum() - kept.sum())


def name_process(rank: int, name: str) -> JsonObject:
    """Name a rank's group of tracks."""
    return {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}}


def name_thread(rank: int, thread: int, name: str) -> JsonObject:
    """Name one of a rank's tracks."""
    return {
        "ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": name},
    }  # fmt: skip


def note_loss(rank: int, count: int, what: str) -> JsonObject:
    """Say in the picture itself that something is missing in it."""
    return {
        "ph": "i", "s": "p", "name": f"{count} older {what} lost", "pid": rank, "tid": _CALLS,
        "ts": 0.0, "args": {"lost": count},
    }  # fmt: skip


def events_of_kernels(
    spans: np.ndarray, roles: Mapping[int, str], rank: int, channels: Channels, base: int
) -> list[JsonObject]:
    """What warps and blocks did.

    Args:
        spans: ``epcomm_cuda_span``, structured array [n].
        roles: names of the numbers in ``spans["role"]``.
        rank: whose.
        channels: of its chunks.
        base: nanoseconds.
    """
    events: list[JsonObject] = []
    for block, warp in sorted({(int(s["block"]), int(s["warp"])) for s in spans}):
        name = f"block {block}" if warp < 0 else f"block {block} warp {warp}"
        events.append(name_thread(rank, _thread(block, warp), name))
    for span in spans:
        arguments: JsonObject = {"call": int(span["epoch"]), "items": int(span["items"])}
        if span["node"] >= 0:
            arguments["node"] = int(span["node"])
        if span["chunk"] >= 0:
            arguments["chunk"] = int(span["chunk"])
            arguments["channel"], arguments["plane"] = channels.of(arguments["chunk"])
        events.append(
            _slice(
                roles[int(span["role"])],
                (rank, _thread(int(span["block"]), int(span["warp"]))),
                (int(span["begin"]), int(span["end"])),
                base,
                arguments,
            )
        )
    return events + _count_warps(spans, roles, rank, base)


def events_of_host(spans: Iterable[Span], rank: int, base: int) -> list[JsonObject]:
    """What the rank's thread that makes the calls did."""
    events = [name_thread(rank, _CALLS, "calls")]
    for span in spans:
        arguments = {"call": span.call}
        events.append(_slice(span.name, (rank, _CALLS), (span.begin, span.end), base, arguments))
    return events


def begins_of_messages(messages: np.ndarray) -> np.ndarray:
    """When messages begin, in nanoseconds: at the doorbell or, if not noted, at the departure."""
    return np.where(messages["rung_ns"] != 0, messages["rung_ns"], messages["depart_ns"])


def events_of_messages(
    messages: np.ndarray, rank: int, rail: Sequence[int], base: int
) -> list[JsonObject]:
    """What the rank's emulated network cards carried.

    A message is an asynchronous event from the doorbell to its completion, because several of a
    queue pair are under way together; within it "wire" is the time on the modelled line and until
    its last bytes were placed. Where doorbell and completion were not noted, it is that time alone.

    Args:
        messages: ``epcomm_fabric_message``, structured array [n].
        rank: whose.
        rail: rank by node.
        base: nanoseconds.
    """
    events: list[JsonObject] = []
    begins = begins_of_messages(messages)
    for number, message in enumerate(messages):
        peer = rail[int(message["peer"])]
        name = (
            f"NIC plane {message['plane']} queue pair {int(message['queue_pair']):#x} "
            f"(channel {message['channel']} to rank {peer})"
        )
        same = {"cat": "nic", "id": f"{rank}.{number}", "pid": rank, "tid": _CALLS}
        depart, arrive, landed, completed = (
            int(message[f"{moment}_ns"]) - base
            for moment in ("depart", "arrive", "landed", "completed")
        )
        details: JsonObject = {
            "bytes": int(message["bytes"]),
            "request": int(message["position"]),
            "in the model, us": (arrive - depart) / 1e3,
        }
        if message["landed_ns"] != 0:
            details["late, us"] = max(0, landed - arrive) / 1e3
        landed = max(depart, landed)
        completed = max(landed, completed)
        begin = int(begins[number]) - base
        events += [
            {**same, "ph": "b", "name": name, "ts": begin / 1e3, "args": details},
            {**same, "ph": "b", "name": "wire", "ts": depart / 1e3},
            {**same, "ph": "e", "name": "wire", "ts": landed / 1e3},
            {**same, "ph": "e", "name": name, "ts": completed / 1e3},
        ]
    return events


def events_of_incidents(
    incidents: np.ndarray, rank: int, rail: Sequence[int], base: int
) -> list[JsonObject]:
    """What the rank's emulated network cards did on purpose, or found: instants of each card.

    Args:
        incidents: ``epcomm_fabric_event``, structured array [n].
        rank: whose.
        rail: rank by node.
        base: nanoseconds.
    """
    events = [
        name_thread(rank, _CARDS + plane, f"NIC plane {plane}")
        for plane in sorted(set(incidents["plane"].tolist()))
    ]
    for incident in incidents:
        plane = int(incident["plane"])
        details: JsonObject = {
            "queue pair": f"{int(incident['queue_pair']):#x}",
            "to rank": rail[int(incident["peer"])],
            "channel": int(incident["channel"]),
            "plane": plane,
            "request": int(incident["position"]),
        }
        if incident["amount_ps"] != 0:
            details["late, us"] = int(incident["amount_ps"]) / 1e6
        events.append(
            {
                "ph": "i", "s": "t", "cat": "nic event",
                "name": describe_event(int(incident["kind"]), int(incident["code"])),
                "pid": rank, "tid": _CARDS + plane,
                "ts": (int(incident["time_ns"]) - base) / 1e3, "args": details,
            }
        )  # fmt: skip
    return events


def _slice(
    name: str, track: tuple[int, int], times: tuple[int, int], base: int, arguments: JsonObject
) -> JsonObject:
    begin, end = times
    return {
        "ph": "X", "name": name, "pid": track[0], "tid": track[1], "ts": (begin - base) / 1e3,
        "dur": (end - begin) / 1e3, "args": arguments,
    }  # fmt: skip


def _thread(block: int, warp: int) -> int:
    return _THREADS_OF_BLOCK * block + warp + 2


def _count_warps(
    spans: np.ndarray, roles: Mapping[int, str], rank: int, base: int
) -> list[JsonObject]:
    """A counter of warps at work, by role."""
    changes: list[tuple[int, str, int]] = []
    for span in spans[spans["warp"] >= 0]:
        role = roles[int(span["role"])]
        if role in _WITHIN:
            continue
        changes += [(int(span["begin"]), role, 1), (int(span["end"]), role, -1)]
    now: dict[str, int] = {role: 0 for _, role, _ in changes}
    events: list[JsonObject] = []
    for at, role, change in sorted(changes):
        now[role] += change
        events.append(
            {"ph": "C", "name": "warps", "pid": rank, "ts": (at - base) / 1e3, "args": dict(now)}
        )
    return events
