"""Whether CUDA MPS runs, which lets kernels of several processes share a GPU."""

import errno
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mps:
    """What was found.

    Attributes:
        runs: a control daemon answers.
        stale: there is the directory of a daemon, but no daemon.
        problem: what is wrong, in words; empty if it runs.
    """

    runs: bool
    stale: bool
    problem: str


def find_mps() -> Mps:
    """Look for the control daemon that this process's CUDA would use."""
    pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps")
    control = pipes / "control"
    try:
        mode = control.stat().st_mode
    except OSError:
        return Mps(False, False, f"{pipes} has no MPS control pipe")
    listens = _socket_listens(control) if stat.S_ISSOCK(mode) else _pipe_has_reader(control)
    if listens:
        return Mps(True, False, "")
    return Mps(
        False,
        True,
        f"{pipes} is left over from an MPS that has ended: remove it, or unset "
        "CUDA_MPS_PIPE_DIRECTORY",
    )


def _socket_listens(path: Path) -> bool:
    """Whether a process has this socket open.

    A datagram socket cannot connect to the daemon's, so the daemon does not notice: the kernel says
    "wrong type" where somebody listens and "refused" where nobody does.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            return error.errno != errno.ECONNREFUSED
    return True


def _pipe_has_reader(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        return error.errno != errno.ENXIO
    return True
