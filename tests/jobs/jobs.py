"""Whole jobs as a user starts them: a launcher, its ranks, and what is left when they end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Exit status of launch/netns.sh where two hosts cannot be made.
CANNOT = 77


@dataclass
class Job:
    """A running launcher.

    Attributes:
        program: what its ranks run.
        folder: the program's first argument, where the ranks put their files.
    """

    process: "subprocess.Popen[str]"
    program: Path
    folder: Path

    def pids(self) -> list[int]:
        """Every process of the machine that was started for this job."""
        wanted = f"\0{self.program}\0{self.folder}\0".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it ended meanwhile
            if wanted in arguments:
                found.append(int(entry.name))
        return found

    def finish(self, seconds: float) -> str:
        """Wait for the end and return what the job printed; skip where there cannot be two hosts.

        Fails the test if the job takes longer, or leaves a process.
        """
        try:
            printed = self.process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job did not end within {seconds:g} s")
        if self.process.returncode == CANNOT:
            pytest.skip(printed.strip().splitlines()[-1])
        assert wait_until(lambda: not self.pids(), 10.0), "processes stay after the job's end"
        return printed


def environment() -> dict[str, str]:
    """Makes a launcher use the interpreter and the packages that run this test."""
    return os.environ | {
        "EPCOMM_INSTALL": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "MPIEXEC_TIMEOUT": "200",
    }


@contextmanager
def start(launcher: list[str], program: str, folder: Path, *arguments: str) -> Iterator[Job]:
    """Start ``program`` of this folder: ``bash launch/<launcher> program folder arguments``."""
    folder.mkdir(exist_ok=True)
    script, *options = launcher
    path = Path(__file__).parent / program
    command = ["bash", f"launch/{script}", *options, str(path), str(folder), *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    job = Job(process, path, folder)
    try:
        yield job
    finally:
        for pid in {process.pid, *job.pids()}:
            if process.poll() is None or pid != process.pid:
                kill(pid)
        process.communicate()


def kill(pid: int) -> None:
    """End a process at once, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether ``condition`` became true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True
