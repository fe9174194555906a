"""Send queues, the emulated NIC and the fabric over it: the C++ tests of tests/native, one by one.

All requests are written by the host through the headers that kernels use. Not tested here, because
hosts do not show it: a missing fence, which only a device's memory order makes visible.
"""

import os
import shlex
import subprocess

import native_programs
import pytest

EMULATED = native_programs.library("emulated")
#: Where producers race, or wait, they call what a test defines (tests/emulation/give_way.h).
FIBERS = ["-DEPCOMM_EMULATED", f"-I{native_programs.ROOT / 'tests/emulation'}"]
PROGRAMS = {
    "emulated_requests": EMULATED,
    "emulated_errors": EMULATED,
    "emulated_overlaps": EMULATED,
    "emulated_line": EMULATED,
    "emulated_schedules": EMULATED,
    "emulated_wrong_writers": EMULATED,
    "emulated_threads": EMULATED,
    "emulated_passages": EMULATED,
    "ibgda_fabric": EMULATED,
    "posting_rate": EMULATED,
    "ibgda_schedules": [*EMULATED, *FIBERS],
    "planes": [*EMULATED, *FIBERS],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.mark.parametrize(("program", "name"), native_programs.all_tests(PROGRAMS))
def test_emulated_nic(folder, program, name):
    native_programs.run(native_programs.build(folder, program, PROGRAMS[program]), name)


def test_definitions_are_those_of_rdma_core(folder):
    """Sizes, offsets, numbers and bytes of csrc/mlx5 against infiniband/mlx5dv.h."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    header = subprocess.run(
        [*compiler, "-E", "-x", "c++", "-"],
        input="#include <infiniband/mlx5dv.h>",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if header.returncode != 0:
        pytest.skip("needs infiniband/mlx5dv.h (Debian and Ubuntu: apt install libibverbs-dev)")
    program = native_programs.build(folder, "mlx5_parity", [])
    assert subprocess.check_output([program], text=True, timeout=60) == "ok\n"
