"""The ladder between nodes: which rungs can be used here, why not, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..fabric.ladder import TRANSPORTS, pick
from .gpus import Gpu
from .nics import Nic
from .report import ABSENT, BROKEN, OK, Finding

TOPIC = "fabrics between nodes"


@dataclass(frozen=True)
class Facts:
    """What the choice depends on.

    Attributes:
        transports: those of the library.
        self_tests: what they found.
        mpi: mpi4py can be imported.
        kernels: the library was built with CUDA.
    """

    gpus: list[Gpu]
    nics: list[Nic]
    transports: tuple[str, ...]
    self_tests: list[Finding]
    mpi: bool
    kernels: bool


def is_mlx5(nic: Nic) -> bool:
    """Whether it is a ConnectX with a port to use."""
    return nic.driver.startswith("mlx5") and bool(nic.active)


def _absent(rung: str, text: str, remedy: str) -> Finding:
    return Finding(TOPIC, rung, ABSENT, text, remedy)


def _tested(rung: str, facts: Facts, prefix: str) -> Finding:
    """By the self-tests of all its ports: one that works is enough."""
    tests = [finding for finding in facts.self_tests if finding.name.startswith(prefix)]
    for finding in tests:
        if finding.status == OK and "," not in finding.name:
            return Finding(TOPIC, rung, OK, f"works: {finding.name}")
    text = "its self-test failed on every port"
    if tests:
        text += f"; {tests[0].name}: {tests[0].text}"
    remedy = tests[0].remedy if tests else "see the network cards above"
    return Finding(TOPIC, rung, BROKEN, text, remedy or "see the self-tests above")


def _lacks(rung: str, facts: Facts) -> Finding | None:
    if TRANSPORTS[rung] in facts.transports:
        return None
    remedy = "install an epcomm that has it"
    return _absent(rung, "this build of the library has no such transport", remedy)


def judge_ibgda(facts: Facts) -> Finding:
    """GPUs that fill a network card's queues themselves."""
    rung = "ibgda"
    needs = "it takes an NVIDIA GPU and, near it, a ConnectX with an active port (docs/ibgda.md)"
    if not facts.gpus:
        return _absent(rung, "no GPU", needs)
    if not any(is_mlx5(nic) for nic in facts.nics):
        return _absent(rung, "no mlx5 network card with an active port", needs)
    if not facts.kernels:
        remedy = "install nvcc and rebuild with EPCOMM_CUDA=1 pip install -e ."
        return _absent(rung, "libepcomm was built without kernels", remedy)
    return _lacks(rung, facts) or _tested(rung, facts, "ibgda ")


def judge_verbs(facts: Facts) -> Finding:
    """Proxy threads that drive a network card."""
    rung = "proxy/verbs"
    if not facts.nics:
        remedy = "it takes an InfiniBand or RoCE network card (docs/fabric-verbs.md)"
        return _absent(rung, "no RDMA network card", remedy)
    if not any(nic.active for nic in facts.nics):
        return _absent(rung, "no network card has an active port", "see the ports above")
    return _lacks(rung, facts) or _tested(rung, facts, "verbs ")


def judge_messages(facts: Facts) -> Finding:
    """MPI, for tensors on the CPU."""
    if facts.mpi:
        return Finding(TOPIC, "mpi", OK, "mpi4py; for tensors on the CPU")
    return _absent("mpi", "no mpi4py", "see MPI above; or use a torch.distributed group (gloo)")


def climb(facts: Facts) -> tuple[Sequence[Finding], str]:
    """(a finding for each rung; one line: the fastest, and why not those before it)."""
    rungs = (judge_ibgda(facts), judge_verbs(facts), judge_messages(facts))
    reasons = {rung.name: "" if rung.status == OK else rung.text for rung in rungs}
    if not facts.mpi:
        reasons["gloo, by a torch.distributed group"] = ""
    return rungs, f"fastest fabric between nodes here: {pick(reasons)[1]}"
