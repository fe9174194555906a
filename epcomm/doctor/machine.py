"""MPI, cores and limits."""

import importlib.util
import os
import resource
import shutil
import subprocess
from pathlib import Path

from .report import ABSENT, BROKEN, NOTE, OK, Finding

_FAMILIES = {"Open MPI": ("Open MPI", "OpenRTE", "prrte"), "MPICH": ("HYDRA", "MPICH")}
#: Shared memory that MPI libraries and gloo use inside a node, and Docker's default.
_ENOUGH_SHM = 256 << 20
_ENOUGH_FILES = 1024


def _family(text: str) -> str:
    for family, words in _FAMILIES.items():
        if any(word in text for word in words):
            return family
    return "unknown"


def _launcher() -> tuple[str, str]:
    """(path, family) of mpirun; empty where there is none."""
    path = shutil.which("mpirun")
    if path is None:
        return "", ""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=8.0)
    return path, _family(said.stdout + said.stderr)


def _mpi4py() -> tuple[str, str]:
    """(version and library, family) of mpi4py; empty where there is none."""
    if importlib.util.find_spec("mpi4py") is None:
        return "", ""
    import mpi4py

    # Without MPI_Init, which may wait for a launcher.
    mpi4py.rc.initialize = False
    from mpi4py import MPI

    library = MPI.Get_library_version().strip("\0 \n").splitlines()[0]
    return f"{mpi4py.__version__} over {' '.join(library.split())}", _family(library)


def probe_mpi() -> list[Finding]:
    """The launcher, and whether mpi4py uses the same MPI."""
    topic = "MPI"
    path, family = _launcher()
    install = "pip install mpich mpi4py, or start a program by bash launch/mpirun.sh, which does"
    if path:
        findings = [Finding(topic, "launcher", OK, f"{path} ({family})")]
    else:
        findings = [Finding(topic, "launcher", ABSENT, "no mpirun on PATH", install)]
    try:
        text, its_family = _mpi4py()
    except (ImportError, RuntimeError) as error:
        remedy = "install an MPI library, such as pip install mpich, or build mpi4py against yours"
        return [*findings, Finding(topic, "mpi4py", BROKEN, str(error), remedy)]
    if not text:
        return [*findings, Finding(topic, "mpi4py", ABSENT, "not installed", install)]
    if path and "unknown" not in (family, its_family) and family != its_family:
        remedy = (
            f"put the mpirun of {its_family} first on PATH, or reinstall mpi4py for {family}: "
            "otherwise every rank is alone in its world"
        )
        findings.append(
            Finding(topic, "mpi4py", BROKEN, f"{text}; but mpirun is {family}'s", remedy)
        )
    else:
        findings.append(Finding(topic, "mpi4py", OK, text))
    return findings


def _quota() -> float | None:
    """Cores of a container's quota; None: none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _ranges(numbers: list[int]) -> str:
    """0,1,2,5 as "0-2,5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def probe_cores() -> list[Finding]:
    """Cores this process may use."""
    mine = sorted(os.sched_getaffinity(0))
    text = f"{len(mine)} of {os.cpu_count()} cores, CPU set {_ranges(mine)}"
    quota = _quota()
    if quota is not None and quota < len(mine):
        remedy = "start as many ranks as the quota has cores, or raise it (--cpus)"
        text += f"; but a quota of {quota:g}"
        return [Finding("processor", "cores", NOTE, text, remedy)]
    return [Finding("processor", "cores", OK, text)]


def _limit(value: int, unit: str) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value} {unit}".strip()


def probe_limits(has_nic: bool) -> list[Finding]:
    """Locked memory, open files, /dev/shm.

    Args:
        has_nic: there is a network card, which needs memory locked.
    """
    topic = "limits"
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    text, remedy = _limit(locked, "bytes"), "ulimit -l unlimited; containers: --ulimit memlock=-1"
    if locked == resource.RLIM_INFINITY:
        findings = [Finding(topic, "locked memory", OK, text)]
    elif has_nic:
        findings = [Finding(topic, "locked memory", NOTE, text, remedy)]
    else:
        text += "; only network cards need more"
        findings = [Finding(topic, "locked memory", OK, text)]
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files != resource.RLIM_INFINITY and files < _ENOUGH_FILES
    findings.append(
        Finding(
            topic,
            "open files",
            NOTE if few else OK,
            f"{_limit(files, '')} (up to {_limit(most, '')})",
            f"ulimit -n {_ENOUGH_FILES} or more" if few else "",
        )
    )
    return [*findings, _shared_memory(topic)]


def _shared_memory(topic: str) -> Finding:
    remedy = "containers: --shm-size=8g; elsewhere: mount -o remount,size=8G /dev/shm"
    try:
        place = os.statvfs("/dev/shm")
    except OSError as error:
        return Finding(topic, "/dev/shm", NOTE, str(error), remedy)
    free, size = place.f_bavail * place.f_frsize, place.f_blocks * place.f_frsize
    text = f"{free >> 20} of {size >> 20} MiB free; MPI and gloo use it, epcomm does not"
    few = free < _ENOUGH_SHM
    return Finding(topic, "/dev/shm", NOTE if few else OK, text, remedy if few else "")
