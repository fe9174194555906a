"""Ranks on two network hosts joined by a slow link that loses frames."""

import json
import signal

import jobs
import pytest


@pytest.mark.parametrize(("ranks", "delay_ms", "loss"), [(2, 5, 2), (4, 1, 1), (6, 0, 0.5)])
def test_equals_the_oracle(tmp_path, ranks, delay_ms, loss):
    """Also with nodes that nobody declared, over MPI and over gloo; the link is as bad as asked."""
    link = ["netns.sh", "--delay", str(delay_ms), "--loss", str(loss), str(ranks)]
    with jobs.start(link, "two_hosts.py", tmp_path) as job:
        printed = job.finish(110.0)
    assert job.process.returncode == 0, printed
    seen = json.loads((tmp_path / "link.json").read_text())
    assert seen["round_trip"] > 2e-3 * delay_ms
    assert seen["retransmitted"] > 0


def test_status_of_the_program(tmp_path):
    """A program that fails is told from hosts that cannot be made."""
    with jobs.start(["netns.sh", "2"], "fail.py", tmp_path) as job:
        printed = job.finish(60.0)
    assert job.process.returncode not in (0, jobs.CANNOT)
    assert "fails on purpose" in printed


@pytest.mark.parametrize("arguments", [["3"], ["--delay", "1ms", "2"], ["--loss"], ["--what", "2"]])
def test_arguments_are_refused(tmp_path, arguments):
    with jobs.start(["netns.sh", *arguments], "two_hosts.py", tmp_path) as job:
        printed = job.finish(30.0)
    assert job.process.returncode == 2
    assert "RANKS arguments" in printed


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_stays_after_a_signal(tmp_path, how):
    """The hosts and all their processes end with the script, however it ends."""
    with jobs.start(["netns.sh", "2"], "sleep.py", tmp_path) as job:
        up = jobs.wait_until(
            lambda: len(list(tmp_path.glob("up.*"))) == 2 or job.process.poll() is not None, 60.0
        )
        if job.process.poll() is None:
            assert up
            job.process.send_signal(how)
        job.finish(10.0)
