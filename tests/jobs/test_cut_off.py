"""Two hosts that lose each other: every rank of both gets a clear error soon, and the job ends."""

import json

import jobs
import pytest

RANKS = 4
TIMEOUT = 3.0
#: What waits one after the other and a loaded machine may add to the deadline.
SLACK = 6.0

CASES = [
    ("calls", "down"),
    ("calls", "one way"),
    ("gloo calls", "down"),
    ("making", "down"),
    ("making", "one way"),
    ("first", "down"),
]


@pytest.mark.parametrize(("when", "how"), CASES)
def test_both_sides_learn_of_it(tmp_path, when, how):
    """The errors name ranks of the other host, all of them where nothing else is going on."""
    link = ["netns.sh", "--delay", "1", "--loss", "0", str(RANKS)]
    with jobs.start(link, "cut_off.py", tmp_path, when, how, str(TIMEOUT)) as job:
        printed = job.finish(90.0)
    outcomes = {rank: tmp_path / f"{rank}.json" for rank in range(RANKS)}
    assert all(path.exists() for path in outcomes.values()), printed
    for rank, path in outcomes.items():
        outcome = json.loads(path.read_text())
        assert outcome["kind"] == "PeerTimeoutError", outcome
        assert outcome["after"] < TIMEOUT + SLACK, outcome
        if when == "first":
            assert "cannot be reached" in outcome["message"]
            continue
        assert outcome["ranks"], outcome
        for named in outcome["ranks"]:
            assert str(named) in outcome["message"]
        if how == "one way":
            continue  # the host that still hears the other one learns that it is itself silent
        others = range(RANKS // 2, RANKS) if rank < RANKS // 2 else range(RANKS // 2)
        assert set(outcome["ranks"]) <= set(others), outcome
        if when == "making":
            assert outcome["ranks"] == list(others)
    assert job.process.returncode not in (0, jobs.CANNOT)
