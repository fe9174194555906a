"""The verbs transport without a network card: choices, refusals, texts, and libibverbs' ABI."""

import os
import shlex
import subprocess
from pathlib import Path

import native_programs
import pytest
from native_programs import ROOT

PROGRAMS = {"nics": native_programs.library("fabric/verbs")}


def compile_with(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*shlex.split(os.environ.get("CXX", "g++")), "-std=c++17", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("verbs")


@pytest.mark.parametrize(("program", "name"), native_programs.all_tests(PROGRAMS))
def test_choices_and_texts(folder, program, name):
    linked = [*PROGRAMS[program], str(ROOT / "csrc/fabric/transport.cc")]
    native_programs.run(native_programs.build(folder, program, linked), name)


def include_folder() -> str | None:
    """Where <infiniband/verbs.h> is: of the system, or among the virtual machine's packages."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    machine = os.environ.get("EPCOMM_VM_CACHE") or Path(cache) / "epcomm/vm"
    for folder in (Path("/usr/include"), Path(machine) / "tree/usr/include"):
        if (folder / "infiniband/verbs.h").is_file():
            return str(folder)
    return None


@pytest.mark.parametrize("changed", [False, True])
def test_declarations_agree_with_the_header_of_libibverbs(changed, tmp_path):
    """And the comparison notices when one does not."""
    folder = include_folder()
    if folder is None:
        pytest.skip("needs <infiniband/verbs.h> (libibverbs-dev, or launch/vm.sh once)")
    source = (ROOT / "tests/native/verbs_parity.cc").read_text()
    declarations = (ROOT / "csrc/fabric/verbs/abi.h").read_text()
    if changed:
        assert "uint32_t vendor_err;" in declarations
        declarations = declarations.replace("uint32_t vendor_err;", "")
        source = source.replace("SAME(Wc, ibv_wc, vendor_err);", "")
    (tmp_path / "abi.h").write_text(declarations)
    check = tmp_path / "check.cc"
    check.write_text(source.replace("../../csrc/fabric/verbs/abi.h", "abi.h"))
    built = compile_with("-fsyntax-only", f"-isystem{folder}", str(check))
    assert (built.returncode != 0) == changed, built.stderr
