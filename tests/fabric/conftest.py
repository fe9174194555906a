"""The transports that the conformance list runs over."""

import os
import signal
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

if os.environ.get("EPCOMM_IN_VM"):
    # The package imports torch, which takes a minute where the processor is emulated. The fabric
    # needs nothing of it, so here the package is its folder only.
    package = types.ModuleType("epcomm")
    package.__path__ = [str(Path(__file__).parents[2] / "epcomm")]
    sys.modules["epcomm"] = package

from ranks import DIRECT  # it imports the package


@dataclass(frozen=True)
class Transport:
    """A transport, its options, and how patient it is with a peer that does not answer."""

    name: str
    arguments: str = ""

    @property
    def is_verbs(self) -> bool:
        return self.name == "verbs"

    @property
    def is_emulated(self) -> bool:
        return self.name.startswith("emulated")

    @property
    def is_direct(self) -> bool:
        """Kernels post by themselves."""
        return self.name in DIRECT

    def status(self, vendor: int) -> int:
        """The status of a work completion that an error's code stands for.

        The emulated card reports (syndrome, vendor code), of which a driver makes a status.
        """
        return _STATUS_OF_SYNDROME[vendor >> 8] if self.is_emulated else vendor


_STARTED = pytest.StashKey["subprocess.Popen[str] | None"]()

#: Of mlx5's syndromes: remote access error, transport retries exceeded.
_STATUS_OF_SYNDROME = {0x13: 10, 0x15: 12}

# A packet is sent again after 4 ms (timeout=10), twice; then the peer counts as lost.
_IMPATIENT = "timeout=10 retries=2"
TRANSPORTS = {
    "local": Transport("local"),
    "emulated": Transport("emulated"),
    "verbs, atomics": Transport("verbs", f"{_IMPATIENT} signal=atomic"),
    "verbs, immediate": Transport("verbs", f"{_IMPATIENT} signal=immediate"),
    "verbs, bounce": Transport("verbs", f"{_IMPATIENT} registration=bounce"),
}
#: Over memory of a GPU: by threads of the host, of the host over emulated NICs, and by kernels.
GPU_TRANSPORTS = {
    name: Transport(name) for name in ("local-cuda", "emulated-cuda-proxy", "emulated-cuda")
}


def rdma_devices() -> list[str]:
    folder = Path("/sys/class/infiniband")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@pytest.fixture(scope="session")
def rdma() -> list[str]:
    """Names of RDMA devices; the test is skipped where there is none."""
    devices = rdma_devices()
    if not devices:
        pytest.skip("needs an RDMA device; launch/vm.sh makes a Soft-RoCE device in a machine")
    return devices


@pytest.fixture(scope="session")
def gpu() -> None:
    """Make sure of a GPU that ranks share through MPS.

    This process, from which they are forked, makes no use of it: what is forked from one that does
    could not.
    """
    told = subprocess.run(
        [sys.executable, str(Path(__file__).parents[2] / "launch/gpus.py")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if told.returncode != 0 or int(told.stdout.split()[0]) == 0:
        pytest.skip("needs a CUDA device")
    if "CUDA_MPS_PIPE_DIRECTORY" not in os.environ:
        pytest.skip("needs a GPU that processes share: run it under launch/gpu.sh --once")


_ALL = {**TRANSPORTS, **GPU_TRANSPORTS}
_PARAMETERS = {
    name: pytest.param(name, marks=pytest.mark.gpu if name in GPU_TRANSPORTS else ())
    for name in _ALL
}
_EMULATED = [_PARAMETERS[name] for name, one in _ALL.items() if one.is_emulated]


@pytest.fixture(params=list(_PARAMETERS.values()))
def transport(request: pytest.FixtureRequest) -> Transport:
    if request.param in GPU_TRANSPORTS:
        request.getfixturevalue("gpu")
    chosen = _ALL[request.param]
    if chosen.is_verbs:
        request.getfixturevalue("rdma")
    return chosen


@pytest.fixture(params=_EMULATED)
def emulated(request: pytest.FixtureRequest) -> str:
    """The name of a transport over emulated NICs."""
    if request.param in GPU_TRANSPORTS:
        request.getfixturevalue("gpu")
    return str(request.param)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STARTED] = None


def pytest_collection_finish(session: pytest.Session) -> None:
    # It spends a minute on importing torch where the processor is emulated; meanwhile the second
    # processor runs the other tests.
    wanted = any(item.path.name == "test_dispatch_combine.py" for item in session.items)
    if wanted and rdma_devices() and not session.config.option.collectonly:
        program = Path(__file__).with_name("dispatch_combine.py")
        session.config.stash[_STARTED] = subprocess.Popen(
            [sys.executable, str(program), "8", "4", "proxy/verbs"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def pytest_unconfigure(config: pytest.Config) -> None:
    started = config.stash[_STARTED]
    if started is not None and started.poll() is None:
        end_with_children(started)


def end_with_children(process: "subprocess.Popen[str]") -> None:
    """Kill a program that was started in a session of its own, and what it forked."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="session")
def started(request: pytest.FixtureRequest) -> "subprocess.Popen[str]":
    """The program of test_dispatch_combine.py, under way since the tests were collected."""
    process = request.config.stash[_STARTED]
    assert process is not None
    return process
