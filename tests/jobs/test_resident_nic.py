"""The GPU-resident engine of the emulated NIC on a GPU: every byte, errors, faults, and its speed.

The programs of tests/native are built with nvcc, each of their tests is a process of its own. Run
with -s to see the tables.
"""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = (
    *("emulated_resident", "emulated_resident_faults", "emulated_resident_writers"),
    *("emulated_resident_speed", "emulated_resident_host"),
)
#: What they are made of, besides their own file.
LIBRARY = (
    *("csrc/emulated/resident.cu", "csrc/emulated/server_cuda.cc", "csrc/emulated/engine.cc"),
    "csrc/fabric/posting.cc",
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def names_in(program):
    text = (ROOT / f"tests/native/{program}.cu").read_text()
    return re.findall(r"^TEST\((\w+)\)", text, re.MULTILINE)


@pytest.fixture(scope="module")
def build(gpu, tmp_path_factory):
    """``build(program)``: the path of the compiled program."""
    before, sys.argv = sys.argv, ["setup.py", "--version"]
    try:
        setup = runpy.run_path(str(ROOT / "setup.py"))
    finally:
        sys.argv = before
    nvcc = setup["find_nvcc"]()
    if nvcc is None:
        pytest.skip("needs an nvcc that can build the kernels")
    folder = tmp_path_factory.mktemp("resident")
    shared = [nvcc, "-std=c++17", "-O3", *setup["gencode"](), "-Icsrc/include", "-cudart", "static"]

    def compiled(source):
        output = folder / f"{Path(source).stem}.o"
        if not output.exists():
            subprocess.run([*shared, "-c", source, "-o", output], cwd=ROOT, check=True, timeout=200)
        return output

    def program(name):
        output = folder / name
        if not output.exists():
            objects = [compiled(f) for f in (f"tests/native/{name}.cu", *LIBRARY)]
            subprocess.run([*shared, *objects, "-o", output], cwd=ROOT, check=True, timeout=200)
        return output

    return program


@pytest.mark.parametrize(
    ("program", "name"), [(program, name) for program in PROGRAMS for name in names_in(program)]
)
def test_resident_nic(build, program, name):
    done = subprocess.run(
        [build(program), name], capture_output=True, text=True, timeout=200, check=False
    )
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
