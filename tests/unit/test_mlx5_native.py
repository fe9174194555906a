"""The set-up of real mlx5 cards, against a fake that records it: the C++ tests of tests/native.

What no fake can show: that a ConnectX accepts the commands, and that a GPU reaches its doorbell.
``python -m epcomm.doctor`` tries that where there is one.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import native_programs
import pytest
from native_programs import ROOT

PROGRAMS: dict[str, list[str]] = {"mlx5_commands": [], "mlx5_failures": [], "mlx5_traffic": []}
#: What opens the vendors' libraries: the fake's tables are linked in their places.
OPENERS = ("library.cc", "cuda_driver.cc", "main.cc")
pytestmark = pytest.mark.timeout(300)


def sources() -> list[str]:
    cards = native_programs.library("fabric/verbs", "fabric/mlx5")
    fake = [str(path) for path in sorted((ROOT / "tests/native").glob("fake_*.cc"))]
    rest = native_programs.library("host", "fabric", "emulated", "carrier")
    return [*(path for path in [*cards, *rest] if Path(path).name not in OPENERS), *fake]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mlx5")


@pytest.fixture(scope="module")
def compiled(folder):
    return native_programs.objects(folder, sources())


@pytest.fixture(scope="module")
def linked(compiled):
    """For programs that make cards of their own."""
    return [path for path in compiled if not path.endswith("-fake_library.o")]


@pytest.mark.parametrize(("program", "name"), native_programs.all_tests(PROGRAMS))
def test_mlx5(folder, linked, program, name):
    native_programs.run(native_programs.build(folder, program, linked), name)


SELF_TESTS = """
from epcomm.cpu.segments import Segment
from epcomm.doctor.ibgda import loopback, write_badly
from epcomm.doctor.selftest import BAD_PLACES, SelfTest
from epcomm.fabric import ladder
from epcomm.fabric.fabric import RegionMemory
from epcomm.fabric.twins import run_twins

test = SelfTest("ibgda", ladder.TRANSPORTS["ibgda"], "nic=mlx5_1", "", direct=True)
print(run_twins(60, loopback, test))
for place in BAD_PLACES:
    print(run_twins(60, write_badly, test, place))
segment = Segment.create("x", 4096)
region = RegionMemory(segment.address, segment.nbytes, segment, segment.fd)
print([ladder.attempt("mlx5", f"local_rank={i} {more}", region)
       for i, more in ((0, ""), (1, ""), (0, "nic=mlx5_7"))])
"""


#: Stands for cards that add wrongly: changes what they did just before it is compared.
TAMPERED = """
import ctypes
from epcomm.doctor import ibgda
from epcomm.doctor.selftest import SelfTest
from epcomm.errors import FabricError
from epcomm.fabric import ladder
from epcomm.fabric.twins import run_twins

def add(memory, word, amount):
    ctypes.c_uint64.from_address(memory.region.address + 8 * word).value += amount

def run(name, tamper):
    honest = getattr(ibgda, name)
    def tampering(*arguments):
        tamper(arguments[0])
        return honest(*arguments)
    setattr(ibgda, name, tampering)
    try:
        print(run_twins(60, ibgda.loopback, test))
    except FabricError as error:
        print(error)
    setattr(ibgda, name, honest)

test = SelfTest("ibgda", ladder.TRANSPORTS["ibgda"], "nic=mlx5_1", "", direct=True)
run("_compare", lambda end: add(end.signals, ibgda._COUNTER, 1))
run("_compare", lambda end: add(end.signals, ibgda._OTHER_SIGNAL, 1))
run("_compare_answers", lambda answers: answers.__setitem__(3, 2))
run("_compare", lambda end: None)
"""


@pytest.fixture(scope="module")
def run_with_cards(compiled, tmp_path_factory):
    """``run(text, **environment)``: lines that a program prints on a machine with two cards.

    Python is the real one.
    """
    folder = tmp_path_factory.mktemp("machine")
    package = folder / "epcomm"
    package.mkdir()
    for entry in (ROOT / "epcomm").iterdir():
        if entry.name != "libepcomm.so":
            (package / entry.name).symlink_to(entry)
    native_programs.shared_library(package / "libepcomm.so", compiled)

    def run(text: str, **more: str) -> list[str]:
        environment = {**os.environ, "PYTHONPATH": str(folder), "TMPDIR": str(folder), **more}
        command = [sys.executable, "-c", text]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=200, env=environment, cwd=folder
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_self_test_notices_wrong_sums_and_answers(run_with_cards):
    total, signals, answers, good = run_with_cards(TAMPERED)
    assert "additions of 1 came to 21, not 20" in total
    assert "signals were raised to [20, 21], not [20, 20]" in signals
    assert "additions of 1 brought back [0, 1, 2, 2, 4, 5," in answers
    assert "not the old values 0 to 19" in answers
    assert good.startswith("mlx5: mlx5_1")


def test_self_test_works_without_atomics_and_says_so(run_with_cards):
    lines = run_with_cards(SELF_TESTS, EPCOMM_FAKE_WITHOUT_ATOMICS="1")
    assert lines[0].endswith(", no atomics: the card has none")
    assert "remote access error" in lines[1]


def test_doctor_and_ladder_use_cards_that_work(run_with_cards):
    good, bad_key, out_of_range, attempts = run_with_cards(SELF_TESTS)
    assert good.startswith("mlx5: mlx5_1 port 1 RoCE GID 3 (::ffff:10.0.0.8, RoCE v2) MTU 4096")
    assert re.search(
        r"requests by the host; us from doorbell to completion: "
        r"512 KiB and a signal [\d.]+ \(written and rung in [\d.]+\), "
        r"a signal alone [\d.]+ \(.*?\), an atomic [\d.]+ \(written and rung in [\d.]+\)$",
        good,
    )
    for error in (bad_key, out_of_range):
        assert "the transport failed: mlx5: remote access error" in error
    assert attempts.startswith("['', '', ")
    assert 'no device "mlx5_7" here; there are: mlx5_0, mlx5_1' in attempts


def linux_header() -> Path | None:
    """Linux' definitions of commands, of a version that names the fields as the comparison does."""
    for place in sorted(Path("/usr/src").glob("linux-headers-*/include/linux/mlx5/mlx5_ifc.h")):
        if "c_eqn_or_apu_element" in place.read_text():
            return place
    return None


@pytest.mark.parametrize("changed", [False, True])
def test_fields_of_commands_lie_where_linux_has_them(changed, tmp_path):
    """And the comparison notices when one does not."""
    header = linux_header()
    if header is None:
        pytest.skip("needs linux/mlx5/mlx5_ifc.h (Debian: apt install linux-headers-amd64)")
    copy = tmp_path / "linux/mlx5"
    copy.mkdir(parents=True)
    for name in ("mlx5_ifc.h", "mlx5_ifc_fpga.h"):
        # C++ knows arrays without a size only at the end.
        text = re.sub(r"\[\](?=[;[])", "[0]", (header.parent / name).read_text())
        (copy / name).write_text(text)
    commands = (ROOT / "csrc/fabric/mlx5/command.h").read_text()
    if changed:
        assert "log_rra_max = {0x488, 3}" in commands
        commands = commands.replace("log_rra_max = {0x488, 3}", "log_rra_max = {0x489, 3}")
    mine = ROOT / "csrc/fabric/mlx5"
    (tmp_path / "command.h").write_text(commands.replace('"library.h"', f'"{mine / "library.h"}"'))
    check = (ROOT / "tests/native/mlx5_command_parity.cc").read_text()
    (tmp_path / "check.cc").write_text(
        check.replace("../../csrc/fabric/mlx5/command.h", str(tmp_path / "command.h"))
    )
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    arguments = ["-std=c++17", "-w", "-fsyntax-only", f"-isystem{tmp_path}"]
    command = [*compiler, *arguments, str(tmp_path / "check.cc")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert (built.returncode != 0) == changed, built.stderr
    assert not changed or "log_rra_max" in built.stderr
