"""GPUs, asked of the CUDA driver without making a context."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

from ..cuda import abi
from ..cuda.mps import find_mps
from ..cuda.requirements import compare_versions
from .report import ABSENT, BROKEN, NOTE, OK, Finding

TOPIC = "GPUs"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_MAJOR, _MINOR, _DMA_BUF = 75, 76, 124  # CU_DEVICE_ATTRIBUTE_*


class DriverError(Exception):
    """The CUDA driver refused; ``code`` is its CUresult, or 0 where there is no driver library."""

    def __init__(self, what: str, code: int = 0) -> None:
        super().__init__(f"{what}: CUDA driver error {code}" if code else what)
        self.code = code


@dataclass(frozen=True)
class Gpu:
    """A GPU; ``peers``: those whose memory it can reach, by index."""

    index: int
    name: str
    sm: str
    pci: str
    dma_buf: bool
    peers: tuple[int, ...]


class _Driver:
    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DriverError("no NVIDIA driver library (libcuda.so.1)") from error
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise DriverError(name, code)

    def number(self, name: str, *arguments: object) -> int:
        """What a function writes to its first argument."""
        value = ctypes.c_int()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value

    def text(self, name: str, device: int) -> str:
        into = ctypes.create_string_buffer(128)
        self.call(name, into, len(into), device)
        return into.value.decode()


def read_gpus() -> list[Gpu]:
    """All GPUs that this process may use.

    Raises:
        DriverError: there is no driver, or it does not work.
    """
    driver = _Driver()
    count = driver.number("cuDeviceGetCount")
    devices = [driver.number("cuDeviceGet", index) for index in range(count)]
    gpus = []
    for index, device in enumerate(devices):
        major, minor, dma_buf = (
            driver.number("cuDeviceGetAttribute", attribute, device)
            for attribute in (_MAJOR, _MINOR, _DMA_BUF)
        )
        peers = tuple(
            other
            for other in range(count)
            if other != index and driver.number("cuDeviceCanAccessPeer", device, devices[other])
        )
        name, pci = (driver.text(f"cuDeviceGet{what}", device) for what in ("Name", "PCIBusId"))
        gpus.append(Gpu(index, name, f"sm_{major}{minor}", pci, bool(dma_buf), peers))
    return gpus


def find_gpus(nodes: Path = Path("/dev")) -> tuple[list[Gpu], list[Finding]]:
    """(GPUs, findings about them and the driver).

    Args:
        nodes: where device files are.
    """
    try:
        gpus = read_gpus()
    except DriverError as error:
        return [], [_no_gpus(error, nodes)]
    findings = [_describe_driver()]
    for gpu in gpus:
        text = f"{gpu.name}, {gpu.sm}, PCIe {gpu.pci}, dma-buf {'yes' if gpu.dma_buf else 'no'}"
        findings.append(Finding(TOPIC, f"GPU {gpu.index}", OK, text))
    return gpus, [*findings, describe_peers(gpus), _describe_mps()]


def _no_gpus(error: DriverError, nodes: Path) -> Finding:
    present = any(nodes.glob("nvidia[0-9]*"))
    mps = find_mps()
    if mps.stale:
        return Finding(TOPIC, "driver", BROKEN, f"{error}; {mps.problem}", "remove it")
    if not present and error.code in (0, _NO_DEVICE):
        remedy = "if there is one: install its driver; containers: --gpus all"
        return Finding(TOPIC, "driver", ABSENT, str(error), remedy)
    remedy = "install the driver's libraries of the version that is loaded (nvidia-smi tells), or"
    remedy += " reboot after an update; containers: --gpus all"
    return Finding(TOPIC, "driver", BROKEN, str(error), remedy)


def _describe_driver() -> Finding:
    version = Path("/proc/driver/nvidia/version")
    kind = "open" if version.exists() and "Open Kernel" in version.read_text() else "closed"
    if not abi.available:
        remedy = "install nvcc and rebuild with EPCOMM_CUDA=1 pip install -e ."
        text = f"works ({kind} kernel modules), but libepcomm has no kernels"
        return Finding(TOPIC, "driver", NOTE, text, remedy)
    driver, runtime = abi.versions()
    try:
        compare_versions(driver, runtime)
    except RuntimeError as error:
        what, _, remedy = str(error).partition("; ")
        return Finding(TOPIC, "driver", BROKEN, what, remedy or "install a newer driver")
    text = f"up to CUDA {driver // 1000}.{driver % 1000 // 10}, {kind} kernel modules"
    return Finding(TOPIC, "driver", OK, text)


def describe_peers(gpus: list[Gpu]) -> Finding:
    """Which GPUs reach each other's memory."""
    missing = [
        f"{gpu.index}-{other.index}"
        for gpu in gpus
        for other in gpus
        if gpu.index < other.index and other.index not in gpu.peers
    ]
    if len(gpus) < 2:
        return Finding(TOPIC, "peers", OK, "one GPU")
    if missing:
        remedy = "nvidia-smi topo -p2p r tells why; make those GPUs nodes of their own"
        text = f"no access between {', '.join(missing)}"
        return Finding(TOPIC, "peers", NOTE, text, remedy)
    return Finding(TOPIC, "peers", OK, f"all {len(gpus)} reach each other's memory")


def describe_doorbells(params: Path = Path("/proc/driver/nvidia/params")) -> Finding:
    """Whether the driver maps a network card's doorbells into a GPU.

    Args:
        params: the parameters of the kernel module.
    """
    text = params.read_text() if params.exists() else ""
    dwords = [line for line in text.splitlines() if line.startswith("RegistryDwords:")]
    if any("PeerMappingOverride=1" in line for line in dwords):
        return Finding(TOPIC, "doorbells", OK, "the driver maps those of network cards into GPUs")
    remedy = 'load the nvidia module with NVreg_RegistryDwords="PeerMappingOverride=1;"'
    what = "PeerMappingOverride is not set: where the driver refuses, a processor rings for the GPU"
    return Finding(TOPIC, "doorbells", NOTE, what, remedy)


def _describe_mps() -> Finding:
    mps = find_mps()
    if mps.runs:
        return Finding(TOPIC, "MPS", OK, "runs")
    remedy = "to share a GPU among ranks: bash launch/gpu.sh, or nvidia-cuda-mps-control -d"
    return Finding(TOPIC, "MPS", BROKEN if mps.stale else ABSENT, mps.problem, remedy)
