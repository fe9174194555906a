"""A rank on a GPU is killed in the middle of a kernel: the others end soon, and new jobs work.

What is promised is in docs/cuda-memory-model.md: every other rank raises an error that names it,
or, where ranks share a GPU and MPS ends its other clients as well, an error of CUDA's.
"""

import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

import jobs
import pytest

ROOT = Path(__file__).parents[2]
#: The buffer's timeout is 3 s; several waits may follow each other, and a call may have begun.
SOON = 15.0
#: In the environment of everything that a job starts: how its processes are found.
MARK = "EPCOMM_TEST_JOB"
#: A rank whose network cards MPS ended says so, where no kernel of its own met CUDA's error before.
CARDS_ENDED = "emulated NICs"

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]


@dataclass(frozen=True)
class World:
    """Ranks, and virtual nodes of as many each. The last rank is the one that is killed."""

    ranks: int
    nodes: int

    @property
    def killed(self):
        return self.ranks - 1


ONE_NODE, TWO_NODES = World(3, 1), World(4, 2)


def processes_of(job):
    """What is left of a job: its ranks, their carriers, whatever else it started.

    But for MPS, which may wait for a killed client for ever; launch/gpu.sh sees to it.
    """
    wanted, found = f"{MARK}={job}\0".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name = (entry / "comm").read_text().strip()
            is_of_job = wanted in (entry / "environ").read_bytes()
        except OSError:
            continue  # it ended meanwhile, or is somebody else's
        if is_of_job and not name.startswith("nvidia-cuda-mps"):
            found.append(f"{entry.name} {name}")
    return found


def run_job(world, how):
    job = uuid.uuid4().hex
    # Of each rank, with its network cards.
    command = ["bash", "launch/gpu.sh", "-n", str(world.ranks), "--sms", "10", "--timeout", "120"]
    program = [sys.executable, "tests/jobs/killed_gpu_rank.py", str(world.ranks), str(world.nodes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: job}
    done = subprocess.run(
        [*command, "--once", *program, how],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert jobs.wait_until(lambda: not processes_of(job), 10.0), processes_of(job)
    report = json.loads(done.stdout.strip().splitlines()[-1])
    report["stderr"] = done.stderr[-4000:]
    return report


def assert_all_well(report, world):
    assert report["stuck"] == []
    kinds = [answer["kind"] for answer in report["answers"]]
    assert kinds == ["returned"] * world.ranks, report
    assert all(answer["usable"] for answer in report["answers"])


def is_by_cuda(answer):
    """Whether MPS ended this rank, or its cards, together with the killed one."""
    return not answer["ours"] or (not answer["ranks"] and CARDS_ENDED in answer["message"])


def blames(answers, world, rank):
    """Where it leads to ask each rank whom it waited for in vain, until one has no answer.

    A rank may have got all that the killed one itself owed it, and then wait for one that has left
    because of that.
    """
    named = {answer["rank"]: answer["ranks"] for answer in answers}
    for _ in range(world.ranks):
        if rank not in named:
            return rank
        (rank,) = named[rank]
    return None


def assert_survivors_say_why(report, world, how, num_gpus):
    answers = report["answers"]
    assert sorted(answer["rank"] for answer in answers) == list(range(world.killed)), report
    assert report["stuck"] == [], report
    by_cuda = [answer for answer in answers if is_by_cuda(answer)]
    # The way to a rank that is gone breaks, if nobody's patience with it has ended before.
    kinds = ["PeerTimeoutError"] if world.nodes == 1 else ["PeerTimeoutError", "FabricError"]
    for answer in answers:
        assert answer["seconds"] < SOON, report
        if answer in by_cuda:
            assert "CUDA" in answer["message"] or CARDS_ENDED in answer["message"], report
        else:
            assert answer["kind"] in kinds, report
        if not by_cuda:
            assert len(answer["ranks"]) == 1, report
            assert blames(answers, world, answer["rank"]) == world.killed, report
            assert f"rank {answer['ranks'][0]}" in answer["message"], report
            assert answer["usable"], report
    if not by_cuda and (world.nodes == 1 or how == "before"):
        assert all(answer["ranks"] == [world.killed] for answer in answers), report
    if num_gpus >= world.ranks:  # nobody shares a GPU with the killed rank
        assert by_cuda == [], report


@pytest.mark.parametrize("how", ["before", "waiting", "moving"])
@pytest.mark.parametrize("world", [ONE_NODE, TWO_NODES], ids=["one node", "two nodes"])
def test_survivors_end_soon_and_a_new_job_works(gpu, world, how):
    assert_survivors_say_why(run_job(world, how), world, how, gpu)
    assert_all_well(run_job(world, "nobody"), world)
