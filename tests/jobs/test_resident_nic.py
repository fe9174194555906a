"""The GPU-resident engine of the emulated NIC on a GPU: every byte, errors, faults, and its speed.

The programs of tests/native are built with nvcc, each of their tests is a process of its own. Run
with -s to see the tables.
"""

import subprocess
import sys

import gpu_programs
import pytest

PROGRAMS = (
    *("emulated_resident", "emulated_resident_alone", "emulated_resident_bulk"),
    *("emulated_resident_faults", "emulated_resident_writers"),
    *("emulated_resident_speed", "emulated_resident_host"),
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def builder(gpu, tmp_path_factory):
    builder = gpu_programs.Builder(tmp_path_factory.mktemp("resident"))
    if builder.nvcc is None:
        pytest.skip("needs an nvcc that can build the kernels")
    return builder


@pytest.mark.parametrize(
    ("program", "name"),
    [(program, name) for program in PROGRAMS for name in gpu_programs.names_in(program)],
)
def test_resident_nic(builder, program, name):
    done = subprocess.run(
        [builder.program(program), name], capture_output=True, text=True, timeout=200, check=False
    )
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
