"""A rank on a GPU is killed in the middle of a kernel: the others end soon, and new jobs work.

What is promised is in docs/cuda-memory-model.md: every other rank raises PeerTimeoutError, or,
where ranks share a GPU and MPS ends its other clients as well, an error of CUDA's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANKS = 3
#: The buffer's timeout is 3 s; several waits may follow each other, and a call may have begun.
SOON = 15.0

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]


def run_job(how):
    command = ["bash", "launch/gpu.sh", "-n", str(RANKS), "--sms", "8", "--timeout", "120"]
    program = [sys.executable, "tests/jobs/killed_gpu_rank.py", str(RANKS), how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--once", *program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.strip().splitlines()[-1])
    report["stderr"] = done.stderr[-4000:]
    return report


def assert_all_well(report):
    assert report["stuck"] == []
    kinds = [answer["kind"] for answer in report["answers"]]
    assert kinds == ["returned"] * RANKS, report
    assert all(answer["usable"] for answer in report["answers"])


@pytest.mark.parametrize("how", ["before", "waiting", "moving"])
def test_survivors_end_soon_and_a_new_job_works(gpu, how):
    report = run_job(how)
    answers = report["answers"]
    assert sorted(answer["rank"] for answer in answers) == list(range(RANKS - 1)), report
    assert report["stuck"] == [], report
    by_cuda = [answer for answer in answers if not answer["ours"]]
    for answer in answers:
        assert answer["seconds"] < SOON, report
        if answer in by_cuda:
            assert "CUDA" in answer["message"], report
        else:
            assert answer["kind"] == "PeerTimeoutError", report
        if not by_cuda:
            assert answer["ranks"] == [RANKS - 1], report
            assert answer["usable"], report
    if gpu >= RANKS:  # nobody shares a GPU with the killed rank
        assert by_cuda == [], report
    assert_all_well(run_job("nobody"))
