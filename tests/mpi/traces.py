"""What tests look for in the traces of timelines."""

from epcomm.timeline import Trace


def begins_of(trace: Trace) -> list[dict]:
    """The first event of every message."""
    nics = [e for e in trace.events if e.get("cat") == "nic" and e["name"] != "wire"]
    return [e for e in nics if e["ph"] == "b"]


def requests_of(trace: Trace) -> set[tuple[int, int, int]]:
    """Plane, queue pair and number of every message's request."""
    words = [(event["name"].split(), event["args"]["request"]) for event in begins_of(trace)]
    return {(int(name[2]), int(name[5], 16), request) for name, request in words}


def instants_of(trace: Trace) -> list[dict]:
    """What network cards did on purpose, or found."""
    return [e for e in trace.events if e["ph"] == "i"]


def assert_on_their_tracks(trace: Trace, rank: int) -> None:
    """Instants of a rank of 2 x 2 are on the tracks of its cards, of requests that were sent."""
    named = [e for e in trace.events if e["ph"] == "M" and e["args"]["name"].startswith("NIC")]
    tracks = {e["args"]["name"]: e["tid"] for e in named}
    assert len(tracks) == len(named)
    sent = requests_of(trace)
    for event in instants_of(trace):
        details = event["args"]
        assert event["pid"] == rank
        assert event["tid"] == tracks[f"NIC plane {details['plane']}"]
        assert details["to rank"] == (rank + 2) % 4
        assert (details["plane"], int(details["queue pair"], 16), details["request"]) in sent
