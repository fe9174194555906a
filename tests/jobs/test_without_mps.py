"""Ranks that share a GPU without MPS are told so, instead of taking turns."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANKS = 2

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


def make_buffers(pipes):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "0",
        "CUDA_MPS_PIPE_DIRECTORY": str(pipes),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "true",
        "HYDRA_LAUNCHER": "fork",
    }
    program = [sys.executable, "-m", "mpi4py", "tests/jobs/make_buffer.py"]
    done = subprocess.run(
        ["mpirun", "-n", str(RANKS), *program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes = done.stdout.splitlines()
    assert len(outcomes) == RANKS, done.stdout
    return outcomes


def test_no_mps_at_all(gpu, tmp_path):
    for outcome in make_buffers(tmp_path / "none"):
        assert outcome.startswith("RuntimeError"), outcome
        assert "2 ranks share a GPU without CUDA MPS" in outcome
        assert "launch/gpu.sh" in outcome


def test_what_an_ended_mps_left(gpu, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as daemon:
        daemon.bind(str(tmp_path / "control"))
    for outcome in make_buffers(tmp_path):
        assert outcome.startswith("RuntimeError"), outcome
        assert str(tmp_path) in outcome, outcome
