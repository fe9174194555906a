"""The transports over emulated NICs on a GPU, with ranks, carriers and engine, on the host.

A fake CUDA runtime (tests/native/fake_device) has shared memory for device memory and runs the
engine's kernel as coroutines. Not tested here: memory order, PCIe, CUDA's own rules and speed.
"""

import native_programs
import pytest

FAKE = native_programs.ROOT / "tests/native/fake_device"
FLAGS = [*native_programs.KERNEL_FLAGS, f"-I{FAKE}"]
SOURCES = [
    *("fabric/end.cc", "fabric/posting.cc", "fabric/proxy.cc", "fabric/transport.cc"),
    *("fabric/emulated_cuda.cc", "fabric/emulated_gpu_cuda.cc", "fabric/emulated_proxy_cuda.cc"),
    *("carrier/rank.cc", "carrier/serve.cc", "carrier/nic_cuda.cc", "emulated/server_cuda.cc"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu_nics")


@pytest.fixture(scope="module")
def linked(folder):
    sources = [str(native_programs.ROOT / "csrc" / name) for name in SOURCES]
    sources += [str(FAKE / "fake_device.cc"), *native_programs.KERNELS_ON_THE_HOST[-1:]]
    return [*FLAGS, *native_programs.objects(folder, sources, FLAGS)]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("program", "name"),
    native_programs.all_tests({"gpu_nics": [], "gpu_nic_failures": []}),
)
def test_gpu_nics(folder, linked, program, name):
    native_programs.run(native_programs.build(folder, program, linked), name)
