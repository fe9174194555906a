"""The test programs of tests/native that need a GPU: built with nvcc.

``python tests/jobs/gpu_programs.py FOLDER PROGRAM...`` builds programs into a folder.
"""

import re
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: What they are made of, besides their own file.
LIBRARY = (
    *("csrc/emulated/resident.cu", "csrc/emulated/server_cuda.cc", "csrc/emulated/engine.cc"),
    "csrc/fabric/posting.cc",
)


def names_in(program: str) -> list[str]:
    text = (ROOT / f"tests/native/{program}.cu").read_text()
    return re.findall(r"^TEST\((\w+)\)", text, re.MULTILINE)


class Builder:
    """Compiles into ``folder`` what it does not have yet. ``nvcc`` is None where there is none."""

    def __init__(self, folder: Path) -> None:
        before, sys.argv = sys.argv, ["setup.py", "--version"]
        try:
            setup = runpy.run_path(str(ROOT / "setup.py"))
        finally:
            sys.argv = before
        self.folder = folder
        self.nvcc: str | None = setup["find_nvcc"]()
        # With lines, for what a tool finds.
        self.options = ["-std=c++17", "-O3", "-lineinfo", *setup["gencode"](), "-Icsrc/include"]

    def run(self, *arguments: str) -> None:
        assert self.nvcc is not None
        command = [self.nvcc, *self.options, "-cudart", "static", *arguments]
        subprocess.run(command, cwd=ROOT, check=True, timeout=200)

    def compiled(self, source: str) -> str:
        output = self.folder / f"{Path(source).stem}.o"
        if not output.exists():
            self.run("-c", source, "-o", str(output))
        return str(output)

    def program(self, name: str) -> Path:
        output = self.folder / name
        if not output.exists():
            objects = [self.compiled(f) for f in (f"tests/native/{name}.cu", *LIBRARY)]
            self.run(*objects, "-o", str(output))
        return output


if __name__ == "__main__":
    builder = Builder(Path(sys.argv[1]).resolve())
    if builder.nvcc is None:
        sys.exit("there is no nvcc that can build the kernels")
    for program in sys.argv[2:]:
        builder.program(program)
