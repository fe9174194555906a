"""The build of libepcomm."""

from ..cuda import abi as cuda_abi
from ..fabric import abi as fabric_abi
from ..version import __version__
from .report import ABSENT, OK, Finding

TOPIC = "library"


def probe_library() -> list[Finding]:
    """Version, kernels and transports."""
    findings = [Finding(TOPIC, "version", OK, f"epcomm {__version__}")]
    if cuda_abi.available:
        runtime = cuda_abi.versions()[1]
        text = f"kernels built with CUDA {runtime // 1000}.{runtime % 1000 // 10}"
        findings.append(Finding(TOPIC, "CUDA part", OK, text))
    else:
        findings.append(
            Finding(
                TOPIC,
                "CUDA part",
                ABSENT,
                "built without kernels: backend 'cpu' only",
                "for GPUs install nvcc and rebuild with EPCOMM_CUDA=1 pip install -e .",
            )
        )
    names = ", ".join(fabric_abi.transports)
    return [*findings, Finding(TOPIC, "transports", OK, names)]
