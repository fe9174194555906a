"""Which fabric is the fastest between nodes here, and why not each faster one."""

from dataclasses import dataclass

from .gpus import Gpu
from .nics import Nic
from .report import OK, Finding


@dataclass(frozen=True)
class Facts:
    """What the choice depends on.

    Attributes:
        transports: those of the library.
        self_tests: what they found.
        mpi: mpi4py can be imported.
    """

    gpus: list[Gpu]
    nics: list[Nic]
    transports: tuple[str, ...]
    self_tests: list[Finding]
    mpi: bool


def why_not_ibgda(facts: Facts) -> str:
    """Why GPUs cannot drive a network card themselves here; empty if they can."""
    if not facts.gpus:
        return "no GPU"
    if not any(nic.driver.startswith("mlx5") and nic.active for nic in facts.nics):
        return "no mlx5 network card with an active port"
    if "ibgda" not in facts.transports:
        return "this library has no such transport"
    return ""


def why_not_verbs(facts: Facts) -> str:
    """Why proxy threads cannot drive a network card here; empty if they can."""
    if not facts.nics:
        return "no RDMA network card"
    if not any(nic.active for nic in facts.nics):
        return "no network card has an active port"
    if "verbs" not in facts.transports:
        return "this library has no such transport"
    tests = [finding for finding in facts.self_tests if finding.name.startswith("verbs ")]
    if not any(finding.status == OK for finding in tests):
        return "its self-test failed on every port"
    return ""


def choose(facts: Facts) -> str:
    """One line: the fabric, and why not those before it in the ladder ibgda, proxy/verbs, mpi."""
    skipped: list[str] = []
    for name, why in (("ibgda", why_not_ibgda(facts)), ("proxy/verbs", why_not_verbs(facts))):
        if not why:
            return _line(name, skipped)
        skipped.append(f"{name}: {why}")
    if facts.mpi:
        return _line("mpi", skipped)
    return _line("gloo, by a torch.distributed group", [*skipped, "mpi: no mpi4py"])


def _line(name: str, skipped: list[str]) -> str:
    return f"fastest fabric between nodes here: {name}" + (
        f" (not {'; not '.join(skipped)})" if skipped else ""
    )
