"""Builds libepcomm, one shared library with a C ABI, into the package.

The library uses neither Python's nor torch's headers, so one wheel serves every Python version.
``CXX`` names the compiler; ``EPCOMM_CXXFLAGS`` adds flags.
"""

import os
import shlex
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildLibrary(build_ext):
    """Compile csrc/ with the plain C++ compiler; the result is not a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
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


class PlatformWheel(bdist_wheel):
    """Tag the wheel py3-none-<platform>: nothing in it depends on CPython's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/host").glob("*.cc"))
setup(
    ext_modules=[Extension("epcomm.libepcomm", sources=sources, depends=headers)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
