"""What is refused about GPUs, drivers and MPS before anything runs; needs no GPU."""

import os
import socket

import pytest

from epcomm.cuda.mps import find_mps
from epcomm.cuda.requirements import check_sharing, compare_versions, debug_delay_ns


def control(folder, kind):
    """Make the control pipe of an MPS; returns what keeps it alive."""
    path = str(folder / "control")
    if kind == "fifo":
        os.mkfifo(path)
        return None
    end = socket.socket(socket.AF_UNIX, kind)
    end.bind(path)
    if kind != socket.SOCK_DGRAM:
        end.listen()
    return end


KINDS = [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM]


@pytest.mark.parametrize("kind", KINDS)
def test_a_daemon_that_listens_is_found_and_not_disturbed(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    with control(tmp_path, kind) as end:
        assert find_mps().runs
        end.setblocking(False)
        with pytest.raises(BlockingIOError):
            end.recv(1) if kind == socket.SOCK_DGRAM else end.accept()


@pytest.mark.parametrize("kind", [*KINDS, "fifo"])
def test_what_an_ended_daemon_left_is_no_mps(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    end = control(tmp_path, kind)
    if end is not None:
        end.close()
    mps = find_mps()
    assert (mps.runs, mps.stale) == (False, True)
    assert str(tmp_path) in mps.problem
    assert "CUDA_MPS_PIPE_DIRECTORY" in mps.problem


def test_a_pipe_that_is_read_is_an_mps(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    control(tmp_path, "fifo")
    reader = os.open(tmp_path / "control", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert find_mps().runs
    finally:
        os.close(reader)


def test_no_directory_is_no_mps(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "none"))
    mps = find_mps()
    assert (mps.runs, mps.stale) == (False, False)
    assert "none" in mps.problem


def test_ranks_that_share_a_gpu_need_mps(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    check_sharing(1)
    with pytest.raises(RuntimeError, match=r"3 ranks share .* MPS .*launch/gpu\.sh"):
        check_sharing(3)
    with control(tmp_path, socket.SOCK_STREAM):
        check_sharing(3)


def test_drivers():
    for driver, runtime in ((12040, 12080), (13000, 12040), (13010, 13000)):
        compare_versions(driver, runtime)
    with pytest.raises(RuntimeError, match=r"up to 12\.4, .* CUDA 13\.0; .* nvcc of CUDA 12$"):
        compare_versions(12040, 13000)
    with pytest.raises(RuntimeError, match="no NVIDIA driver"):
        compare_versions(0, 13000)


def test_delays_come_from_the_environment(monkeypatch):
    monkeypatch.delenv("EPCOMM_CUDA_DELAY_NS", raising=False)
    assert debug_delay_ns() == 0
    monkeypatch.setenv("EPCOMM_CUDA_DELAY_NS", "20000")
    assert debug_delay_ns() == 20000
    for bad in ("1e4", "-1", str(2**31)):
        monkeypatch.setenv("EPCOMM_CUDA_DELAY_NS", bad)
        with pytest.raises(ValueError, match="EPCOMM_CUDA_DELAY_NS: expected nanoseconds"):
            debug_delay_ns()
