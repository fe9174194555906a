"""All probes in their order, each with a deadline."""

from pathlib import Path

from ..cuda import abi
from ..fabric.abi import transports
from ..fabric.ladder import TRANSPORTS
from . import gpus, ladder, nics, selftest
from .guard import ProbeError, findings_within, within
from .ibgda import run_ibgda_test
from .library import TOPIC as LIBRARY
from .library import probe_library
from .machine import probe_cores, probe_limits, probe_mpi
from .report import BROKEN, OK, Finding

#: Seconds of a probe that only looks.
_LOOK = 10.0
#: Seconds of the first call of a GPU driver, which may have to wake many GPUs.
_WAKE = 60.0
_SYSFS, _DEVICES = Path("/sys"), Path("/dev/infiniband")


def examine() -> tuple[list[Finding], str]:
    """(all findings, the fabric for several nodes)."""
    findings = findings_within(_LOOK, LIBRARY, "rebuild: pip install -e .", probe_library)
    remedy = "'mpirun --version' and 'python -c \"from mpi4py import MPI\"' must work"
    findings += findings_within(_LOOK, "MPI", remedy, probe_mpi)
    findings += probe_cores()
    cards = nics.read_nics(_SYSFS)
    findings += probe_limits(bool(cards))
    try:
        devices, about_gpus = within(_WAKE, gpus.find_gpus)
    except ProbeError as error:
        remedy = "nvidia-smi must work; reset the GPU or reboot if it does not"
        devices, about_gpus = [], [Finding(gpus.TOPIC, "driver", BROKEN, str(error), remedy)]
    findings += about_gpus
    if devices and any(map(ladder.is_mlx5, cards)):
        findings.append(gpus.describe_doorbells())
    findings += nics.describe_nics(cards, _SYSFS, _DEVICES)
    findings += nics.probe_modules(bool(cards), bool(devices))
    tests: list[Finding] = []
    for test in self_tests(devices, cards, transports):
        tests += run_ibgda_test(test) if test.direct else selftest.run_self_test(test)
    mpi = any(f.name == "mpi4py" and f.status == OK for f in findings)
    facts = ladder.Facts(devices, cards, transports, tests, mpi, abi.available)
    rungs, verdict = ladder.climb(facts)
    return [*findings, *tests, *rungs], verdict


def self_tests(
    devices: list[gpus.Gpu],
    cards: list[nics.Nic],
    known: tuple[str, ...],
    kernels: bool = abi.available,
) -> list[selftest.SelfTest]:
    """The transports of the library that can work on these GPUs and cards."""
    test = selftest.SelfTest
    remedy = "containers: allow opening /proc/PID/fd of the own user's processes (ptrace)"
    tests = [test(name, name, "", remedy) for name in ("local", "emulated")]
    if devices:
        remedy = 'CUDA IPC needs CuPy (pip install -e ".[cuda13]"), and containers --ipc=host'
        tests.append(test("local-cuda", "local-cuda", "", remedy, on_gpu=True))
    for card in cards:
        for port in card.active:
            place = f"{card.name}:{port.number}"
            remedy = f"ibv_rc_pingpong -d {card.name} -i {port.number} must work; ulimit -l; GIDs"
            # An answer that does not come is noticed in less than a second.
            how = f"nic={place} timeout=14 retries=3"
            tests.append(test(f"verbs {place}", "verbs", how, remedy))
            if ladder.is_mlx5(card):
                # Without a GPU a thread of this machine fills the card's queues.
                remedy = "the reason says what to do; without it: fabric='proxy/verbs'"
                on_gpu = bool(devices) and kernels
                name = f"ibgda {place}"
                tests.append(test(name, TRANSPORTS["ibgda"], how, remedy, on_gpu, direct=True))
    return [one for one in tests if one.transport in known]
