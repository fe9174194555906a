"""Rings, proxy threads and the receive protocol: the C++ tests of tests/native, one by one."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ("rings", "proxies", "model")


def source(program: str) -> Path:
    return ROOT / "tests/native" / f"{program}.cc"


def names_in(program: str) -> list[str]:
    return re.findall(r"^TEST\((\w+)\)", source(program).read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Compile a program once; returns its path."""
    folder = tmp_path_factory.mktemp("native")
    library = [
        str(path)
        for place in ("host", "fabric")
        for path in sorted((ROOT / "csrc" / place).glob("*.cc"))
        if not path.stem.endswith("_cuda")
    ]

    def build(program: str) -> Path:
        output = folder / program
        if not output.exists():
            command = [
                *shlex.split(os.environ.get("CXX", "g++")),
                *("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"),
                f"-I{ROOT / 'csrc/include'}",
                str(source(program)),
                *(library if program != "rings" else []),
                *("-ldl", "-o", str(output)),
            ]
            subprocess.run(command, check=True, timeout=110)
        return output

    return build


@pytest.mark.parametrize(
    ("program", "name"), [(program, name) for program in PROGRAMS for name in names_in(program)]
)
def test_native(built, program, name):
    done = subprocess.run(
        [built(program), name], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
