"""Tests that start jobs of their own, because what they do may end or break a whole job."""

import ctypes
import subprocess
from pathlib import Path

import jobs
import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile the kernels before the first test: jobs that do it beside each other take long."""
    if any(item.path.parent == Path(__file__).parent for item in session.items):
        command = ["bash", "-c", "source launch/env.sh; warm_up"]
        subprocess.run(command, cwd=jobs.ROOT, env=jobs.environment(), check=True)


@pytest.fixture(scope="session")
def gpu():
    """A GPU, of which this process makes no context: the jobs share it without this process."""
    count = ctypes.c_int(0)
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        pytest.skip("needs a CUDA device: there is no driver")
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or not count.value:
        pytest.skip("needs a CUDA device")
    return count.value
