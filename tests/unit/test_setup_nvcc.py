"""Which nvcc the build takes, and what it says where there is none it can use."""

import runpy
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture
def find_nvcc(monkeypatch, tmp_path):
    """``find_nvcc(release, compiles)``: setup.py's answer where only this nvcc exists."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    functions = runpy.run_path(str(SETUP))
    monkeypatch.setattr(sys, "path", [])

    def find(release=None, compiles="exit 0", wanted="auto"):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
        monkeypatch.setenv("EPCOMM_CUDA", wanted)
        monkeypatch.delenv("EPCOMM_CUDA_ARCH", raising=False)
        (tmp_path / "bin").mkdir()
        if release is not None:
            nvcc = tmp_path / "bin/nvcc"
            nvcc.write_text(
                "#!/bin/sh\n"
                f'case $1 in --version) echo "release {release}, V{release}.1"; exit 0 ;; esac\n'
                f"{compiles}\n"
            )
            nvcc.chmod(0o755)
        return functions["find_nvcc"]()

    return find


@pytest.mark.parametrize("release", ["12.4", "12.10", "13.0"])
def test_a_new_nvcc_is_taken(find_nvcc, release, tmp_path):
    assert find_nvcc(release) == str(tmp_path / "bin/nvcc")


@pytest.mark.parametrize("release", ["11.8", "12.3", "9.2"])
def test_an_old_nvcc_is_left_alone(find_nvcc, release, capfd):
    assert find_nvcc(release) is None
    told = capfd.readouterr().err
    assert f"is of CUDA {release}, and 12.4 or newer is needed; set CUDA_HOME" in told


def test_an_old_nvcc_fails_a_build_that_must_have_cuda(find_nvcc):
    with pytest.raises(SystemExit, match=r"EPCOMM_CUDA=1, but .* is of CUDA 12\.2, and 12\.4"):
        find_nvcc("12.2", wanted="1")


def test_an_nvcc_that_cannot_do_the_architecture_is_left_alone(find_nvcc, capfd):
    words = "nvcc fatal: Unsupported gpu architecture 'compute_90a'"
    assert find_nvcc("12.4", f'echo "{words}" >&2; exit 1') is None
    assert f"cannot compile for 90a ({words})" in capfd.readouterr().err


def test_an_nvcc_that_cannot_compile_fails_a_build_that_must_have_cuda(find_nvcc):
    with pytest.raises(SystemExit, match=r"cannot compile for 90a \(unsupported GNU version"):
        find_nvcc("13.0", 'echo "unsupported GNU version" >&2; exit 1', wanted="1")


def test_the_probe_asks_for_the_architectures_of_the_build(find_nvcc, tmp_path):
    asked = tmp_path / "asked"
    assert find_nvcc("13.0", f'echo "$@" > {asked}') is not None
    assert "-gencode=arch=compute_90a,code=sm_90a" in asked.read_text()


def test_something_that_is_no_nvcc_is_left_alone(find_nvcc, capfd):
    assert find_nvcc("unknown") is None
    assert "does not tell a release" in capfd.readouterr().err


def test_no_nvcc(find_nvcc, capfd):
    assert find_nvcc() is None
    assert capfd.readouterr().err == ""


def test_no_nvcc_where_cuda_is_a_must(find_nvcc):
    with pytest.raises(SystemExit, match="EPCOMM_CUDA=1, but nvcc was not found: set CUDA_HOME"):
        find_nvcc(wanted="1")


def test_no_cuda_is_wanted(find_nvcc):
    assert find_nvcc("13.0", wanted="0") is None
