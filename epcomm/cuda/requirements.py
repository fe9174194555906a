"""What a rank's process needs before it makes a CUDA buffer, each with words for where it lacks."""

import os

import torch

from .. import native
from . import abi
from .mps import find_mps

_NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice


def debug_delay_ns() -> int:
    """``EPCOMM_CUDA_DELAY_NS``: for tests, the longest delay of a block at a place of the protocol.

    Raises:
        ValueError: not a number of nanoseconds.
    """
    text = os.environ.get("EPCOMM_CUDA_DELAY_NS") or "0"
    if not text.isdecimal() or int(text) >= 2**31:
        raise ValueError(
            f"EPCOMM_CUDA_DELAY_NS: expected nanoseconds, 0 to {2**31 - 1}, got {text!r}"
        )
    return int(text)


def check_driver() -> None:
    """Refuse a library without kernels, and a driver that cannot run them. Raises RuntimeError."""
    if not abi.available:
        raise RuntimeError(
            "backend 'cuda': libepcomm was built without CUDA; install nvcc and rebuild with "
            "EPCOMM_CUDA=1 pip install -e ."
        )
    compare_versions(*abi.versions())


def compare_versions(driver: int, runtime: int) -> None:
    """Refuse a driver that cannot run kernels built with ``runtime``; both as in 12040 for 12.4.

    A driver runs what a toolkit of its own or an earlier major version built.

    Raises:
        RuntimeError: no driver, or one that is too old.
    """
    if driver == 0:
        raise RuntimeError("backend 'cuda': no NVIDIA driver found")
    if driver // 1000 < runtime // 1000:
        raise RuntimeError(
            f"backend 'cuda': the driver supports CUDA up to {_version(driver)}, and libepcomm was "
            f"built with CUDA {_version(runtime)}; install a newer driver, or rebuild libepcomm "
            f"with an nvcc of CUDA {driver // 1000}"
        )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def check_gpu() -> int:
    """Index of a GPU that can run the kernels, which are loaded. Raises RuntimeError."""
    if not torch.cuda.is_available():
        mps = find_mps()
        why = f"; {mps.problem}, so that no program finds a GPU" if mps.stale else ""
        raise RuntimeError(f"backend 'cuda': torch finds no CUDA device{why}")
    index = torch.cuda.current_device()
    torch.cuda.set_device(index)  # the library's runtime finds the context that this makes current
    code = native.library.epcomm_cuda_load()
    if code == _NO_KERNEL_IMAGE:
        major, minor = torch.cuda.get_device_capability(index)
        raise RuntimeError(
            f"backend 'cuda': libepcomm has no kernels for this GPU, sm_{major}{minor}; rebuild it "
            f"with EPCOMM_CUDA_ARCH={major}{minor} (sm_90: 90a)"
        )
    abi.check(code, "backend 'cuda': loading the kernels")
    return index


def check_sharing(num_ranks: int) -> None:
    """Refuse ranks that would take turns on their GPU. Raises RuntimeError."""
    if num_ranks == 1:
        return
    mps = find_mps()
    if not mps.runs:
        raise RuntimeError(
            f"backend 'cuda': {num_ranks} ranks share a GPU without CUDA MPS ({mps.problem}); "
            "their kernels would take turns instead of running together; start the program with "
            "'bash launch/gpu.sh', or start nvidia-cuda-mps-control -d before it"
        )
