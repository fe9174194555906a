"""Builds libepcomm, one shared library with a C ABI, into the package.

The library uses neither Python's nor torch's headers, so one wheel serves every Python version.
``CXX`` names the compiler; ``EPCOMM_CXXFLAGS`` adds flags.

Where nvcc is found (in ``CUDA_HOME``, on PATH, or in NVIDIA's package from PyPI) the CUDA kernels
are built into the library. ``EPCOMM_CUDA``: ``auto`` (the default: without CUDA where there is no
nvcc that can build the kernels), ``1`` (fail then) or ``0``. ``EPCOMM_CUDA_ARCH``: architectures,
by default ``90a``; for example ``80,90a,100``.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


DEFAULT_ARCH = "90a"
#: The first release with all that the kernels use.
OLDEST_NVCC = (12, 4)


def find_nvcc() -> str | None:
    """Path of an nvcc that can build the kernels, or None for a library without CUDA."""
    wanted = os.environ.get("EPCOMM_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"EPCOMM_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    nvcc = look_for_nvcc()
    if nvcc is None:
        problem = "nvcc was not found"
        remedy = "set CUDA_HOME, put nvcc on PATH, or pip install nvidia-cuda-nvcc"
    else:
        problem = try_nvcc(nvcc)
        remedy = "set CUDA_HOME to a newer CUDA, or EPCOMM_CUDA_ARCH to an architecture it knows"
    if not problem:
        return nvcc
    if wanted == "1":
        raise SystemExit(f"EPCOMM_CUDA=1, but {problem}: {remedy}")
    if nvcc is not None:
        print(f"epcomm: building without CUDA, because {problem}; {remedy}", file=sys.stderr)
    return None


def look_for_nvcc() -> str | None:
    """Path of the first nvcc there is."""
    home = os.environ.get("CUDA_HOME")
    places = [Path(home) / "bin/nvcc"] if home else []
    on_path = shutil.which("nvcc")
    places += [Path(on_path)] if on_path else []
    for entry in sys.path:
        places += sorted(Path(entry).glob("nvidia/*/bin/nvcc"))
    for place in places:
        if place.is_file():
            return str(place)
    return None


def try_nvcc(nvcc: str) -> str:
    """Why this nvcc cannot build the kernels; empty if it can."""
    told = run([nvcc, "--version"])
    version = re.search(r"release (\d+)\.(\d+)", told.stdout)
    if told.returncode != 0 or version is None:
        return f"'{nvcc} --version' does not tell a release"
    if tuple(map(int, version.groups())) < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        return f"{nvcc} is of CUDA {'.'.join(version.groups())}, and {oldest} or newer is needed"
    # Whether it knows the architectures, and likes the host's compiler and library.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text("#include <cuda_runtime.h>\n__global__ void probe() {}\n")
        compiled = run([nvcc, *gencode(), "-c", str(source), "-o", str(source.with_suffix(".o"))])
    if compiled.returncode == 0:
        return ""
    words = (compiled.stderr + compiled.stdout).strip().splitlines()
    arches = os.environ.get("EPCOMM_CUDA_ARCH", DEFAULT_ARCH)
    return f"{nvcc} cannot compile for {arches} ({words[0] if words else 'it says nothing'})"


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that may fail, or not even start."""
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def gencode() -> list[str]:
    """Nvcc's options for the architectures to build for."""
    arches = os.environ.get("EPCOMM_CUDA_ARCH", DEFAULT_ARCH).split(",")
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in arches]


class BuildLibrary(build_ext):
    """Compile csrc/ with the plain C++ compiler (and nvcc); the result is not a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: the carrier beside the library."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "epcomm/epcomm-carrier"
        self.copy_file(str(built), str(ROOT / "epcomm/epcomm-carrier"))

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc()
        if nvcc is not None:
            self.build_with_cuda(nvcc, ext, output)
            return
        command = [
            *shlex.split(os.environ.get("CXX", "g++")),
            *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
            *("-Wall", "-Wextra"),
            *shlex.split(os.environ.get("EPCOMM_CXXFLAGS", "")),
            f"-I{ROOT / 'csrc/include'}",
            *ext.sources,
            *("-ldl", "-o", str(output)),
        ]
        print(shlex.join(command), flush=True)
        self.spawn(command)
        self.build_carrier(output.parent)

    def build_carrier(self, folder: Path) -> None:
        """The executable of a rank's carrier, which finds the library beside itself."""
        command = [
            *shlex.split(os.environ.get("CXX", "g++")),
            *("-std=c++17", "-O2", "csrc/carrier/main.cc"),
            *(f"-L{folder}", "-l:libepcomm.so", "-Wl,-rpath,$ORIGIN"),
            *("-o", str(folder / "epcomm-carrier")),
        ]
        print(shlex.join(command), flush=True)
        self.spawn(command)

    def build_with_cuda(self, nvcc: str, ext: Extension, output: Path) -> None:
        """One object per kernel file, then everything into one library with its own runtime."""
        shared = [
            nvcc,
            *("-std=c++17", "-O3", "-cudart", "static"),
            *gencode(),
            *("--compiler-options", "-fPIC,-pthread,-fvisibility=hidden,-Wall,-Wextra"),
            f"-I{ROOT / 'csrc/include'}",
        ]
        host_flags = shlex.split(os.environ.get("EPCOMM_CXXFLAGS", ""))
        for flag in host_flags:
            shared += ["--compiler-options", flag]
        objects = []
        temporary = Path(self.build_temp)
        temporary.mkdir(parents=True, exist_ok=True)
        for source in cuda_sources:
            objects.append(str(temporary / f"{Path(source).stem}.o"))
            # The report of registers and spills is what a build log is read for.
            command = [*shared, "-Xptxas", "-v", "-c", source, "-o", objects[-1]]
            print(shlex.join(command), flush=True)
            self.spawn(command)
        command = [
            *shared,
            "-shared",
            *ext.sources,
            *sources_with_cuda,
            *objects,
            "-ldl",
            "-o",
            str(output),
        ]
        print(shlex.join(command), flush=True)
        self.spawn(command)
        self.build_carrier(output.parent)


class PlatformWheel(bdist_wheel):
    """Tag the wheel py3-none-<platform>: nothing in it depends on CPython's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
kernels = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu*"))
cuda_sources = [p for p in kernels if p.endswith(".cu")]
host_sources = sorted(
    str(p.relative_to(ROOT))
    for place in ("host", "fabric", "emulated", "carrier")
    for p in (ROOT / "csrc" / place).rglob("*.cc")
    if p.name != "main.cc"
)
# Host code that calls the CUDA runtime.
sources_with_cuda = [p for p in host_sources if p.endswith("_cuda.cc")]
sources = [p for p in host_sources if p not in sources_with_cuda]
setup(
    ext_modules=[
        Extension(
            "epcomm.libepcomm", sources=sources, depends=[*headers, *kernels, *sources_with_cuda]
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
