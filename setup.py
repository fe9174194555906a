"""Builds libepcomm, one shared library with a C ABI, into the package.

The library uses neither Python's nor torch's headers, so one wheel serves every Python version.
``CXX`` names the compiler; ``EPCOMM_CXXFLAGS`` adds flags.

Where nvcc is found (in ``CUDA_HOME``, on PATH, or in NVIDIA's package from PyPI) the CUDA kernels
are built into the library. ``EPCOMM_CUDA``: ``auto`` (the default), ``1`` (fail without nvcc) or
``0``. ``EPCOMM_CUDA_ARCH``: architectures, by default ``90a``; for example ``80,90a,100``.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """Path of nvcc, or None for a library without CUDA."""
    wanted = os.environ.get("EPCOMM_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"EPCOMM_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    places = [Path(home) / "bin/nvcc"] if home else []
    on_path = shutil.which("nvcc")
    places += [Path(on_path)] if on_path else []
    for entry in sys.path:
        places += sorted(Path(entry).glob("nvidia/*/bin/nvcc"))
    for place in places:
        if place.is_file():
            return str(place)
    if wanted == "1":
        raise SystemExit(
            "EPCOMM_CUDA=1, but nvcc was not found: set CUDA_HOME, put nvcc on PATH, or "
            "pip install nvidia-cuda-nvcc"
        )
    return None


class BuildLibrary(build_ext):
    """Compile csrc/ with the plain C++ compiler (and nvcc); the result is not a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc()
        if nvcc is not None:
            self.build_with_cuda(nvcc, ext, output)
            return
        command = [
            *shlex.split(os.environ.get("CXX", "g++")),
            *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"),
            *shlex.split(os.environ.get("EPCOMM_CXXFLAGS", "")),
            f"-I{ROOT / 'csrc/include'}",
            *ext.sources,
            *("-o", str(output)),
        ]
        print(shlex.join(command), flush=True)
        self.spawn(command)

    def build_with_cuda(self, nvcc: str, ext: Extension, output: Path) -> None:
        """One object per kernel file, then everything into one library with its own runtime."""
        arches = os.environ.get("EPCOMM_CUDA_ARCH", "90a").split(",")
        shared = [
            nvcc,
            *("-std=c++17", "-O3", "-cudart", "static"),
            *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in arches),
            *("--compiler-options", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"),
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
        command = [*shared, "-shared", *ext.sources, *objects, "-o", str(output)]
        print(shlex.join(command), flush=True)
        self.spawn(command)


class PlatformWheel(bdist_wheel):
    """Tag the wheel py3-none-<platform>: nothing in it depends on CPython's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
kernels = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu*"))
cuda_sources = [p for p in kernels if p.endswith(".cu")]
sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/host").glob("*.cc"))
setup(
    ext_modules=[Extension("epcomm.libepcomm", sources=sources, depends=[*headers, *kernels])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
