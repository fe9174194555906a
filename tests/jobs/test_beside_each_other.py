"""Jobs of one user on one machine: they do not meet, and a killed one leaves nothing behind."""

from contextlib import ExitStack
from pathlib import Path

import jobs
import pytest

#: Several jobs one after the other and beside each other, on few cores.
pytestmark = pytest.mark.timeout(500)
RANKS = 4
LAUNCHER = ["mpirun.sh", str(RANKS)]


def left_behind() -> list[str]:
    """What is epcomm's in the places where memory outlives a process."""
    return sorted(path.name for path in Path("/dev/shm").iterdir() if "epcomm" in path.name)


def start_pair(stack: ExitStack, tmp_path: Path, turn: str) -> list[jobs.Job]:
    folders = [tmp_path / f"{turn} {name}" for name in ("one", "other")]
    return [
        stack.enter_context(
            jobs.start(LAUNCHER, "beside.py", folder, str(folders[1 - n]), str(n + 1))
        )
        for n, folder in enumerate(folders)
    ]


def test_two_jobs_at_once(tmp_path):
    """Each one equals its own oracle while both make Buffers and call."""
    before = left_behind()
    with ExitStack() as stack:
        for job in start_pair(stack, tmp_path, "both"):
            printed = job.finish(200.0)
            assert job.process.returncode == 0, printed
            assert (job.folder / "done").exists()
    assert left_behind() == before


def test_kill_of_a_whole_job(tmp_path):
    """SIGKILL for every process of a job: the job beside it goes on, and the next one starts."""
    before = left_behind()
    with ExitStack() as stack:
        killed, other = start_pair(stack, tmp_path, "first")
        assert jobs.wait_until(lambda: (other.folder / "up").exists(), 60.0)
        assert jobs.wait_until(lambda: (killed.folder / "up").exists(), 60.0)
        # Its launcher first, or that would end the ranks in order.
        jobs.kill(killed.process.pid)
        for pid in killed.pids():
            jobs.kill(pid)
        killed.finish(20.0)
        assert not (killed.folder / "done").exists()
        printed = other.finish(200.0)
        assert other.process.returncode == 0, printed
        assert left_behind() == before
        for job in start_pair(stack, tmp_path, "next"):
            printed = job.finish(200.0)
            assert job.process.returncode == 0, printed
    assert left_behind() == before
