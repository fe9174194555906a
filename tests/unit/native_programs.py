"""The C++ test programs of tests/native: compiled once, each of their tests run by itself."""

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]


def source(program: str) -> Path:
    return ROOT / "tests/native" / f"{program}.cc"


def names_in(program: str) -> list[str]:
    return re.findall(r"^TEST\((\w+)\)", source(program).read_text(), re.MULTILINE)


def all_tests(programs: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(program, name) for program in programs for name in names_in(program)]


def library(*places: str) -> list[str]:
    """The library's host sources in these folders of csrc."""
    return [
        str(path)
        for place in places
        for path in sorted((ROOT / "csrc" / place).glob("*.cc"))
        if not path.stem.endswith("_cuda") and path.name != "main.cc"
    ]


#: For programs that run kernels on the host: kernels' words, and what stands for a GPU.
KERNEL_FLAGS = [
    *("-DEPCOMM_EMULATED", "-include", "cuda_emulation.h", f"-I{ROOT / 'tests/emulation'}"),
    *("-Wno-attributes", "-Wno-unknown-pragmas"),
]
KERNELS_ON_THE_HOST = [*KERNEL_FLAGS, str(ROOT / "tests/emulation/cuda_emulation.cc")]


def _compile(*arguments: str) -> None:
    command = [
        *shlex.split(os.environ.get("CXX", "g++")),
        *("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"),
        f"-I{ROOT / 'csrc/include'}",
        *arguments,
    ]
    subprocess.run(command, check=True, timeout=110)


def build(folder: Path, program: str, linked: list[str]) -> Path:
    """Compile a program if ``folder`` does not have it; returns its path."""
    output = folder / program
    if not output.exists():
        _compile(str(source(program)), *linked, *("-ldl", "-o", str(output)))
    return output


def objects(folder: Path, sources: list[str], flags: Sequence[str] = ()) -> list[str]:
    """Compile sources side by side; returns the objects."""
    outputs = [str(folder / f"{i}-{Path(one).stem}.o") for i, one in enumerate(sources)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(
            lambda one, out: _compile("-fPIC", *flags, "-c", one, "-o", out), sources, outputs
        )
        list(compiled)
    return outputs


def shared_library(output: Path, linked: list[str]) -> None:
    """Link objects into a library."""
    _compile("-shared", *linked, "-ldl", "-o", str(output))


def run(program: Path, name: str) -> None:
    done = subprocess.run([program, name], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
