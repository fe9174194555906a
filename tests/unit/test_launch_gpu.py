"""Finding GPUs and refusing what does not fit them, with a driver that is only a stand-in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
DRIVER = """
extern "C" int cuInit(unsigned) { return FAILS; }
extern "C" int cuDeviceGetCount(int* count) { *count = GPUS; return 0; }
extern "C" int cuDriverGetVersion(int* version) { *version = 13010; return 0; }
extern "C" int cuDeviceGetAttribute(int* value, int what, int) {
    *value = what == 16 ? 100 : -1;
    return 0;
}
"""


#: Skips its own options and runs the program in the place of every rank.
MPIRUN = """#!/bin/sh
while [ "$1" != bash ]; do shift; done
rank=0
while [ $rank -lt RANKS ]; do
    MPI_LOCALRANKID=$rank "$@"
    rank=$((rank + 1))
done
"""


def run(folder, *arguments, gpus=None, fails=0, ranks=None):
    """Run a launcher where the driver shows so many GPUs of 100 SMs, or there is none.

    With ``ranks``, programs under mpirun really run, one rank after the other.
    """
    if gpus is not None:
        source = folder / "driver.cc"
        source.write_text(DRIVER.replace("FAILS", str(fails)).replace("GPUS", str(gpus)))
        compiler = os.environ.get("CXX", "g++")
        library = folder / "libcuda.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    # A process that ends in mpirun would really start ranks.
    for program in ("mpirun", "nvidia-cuda-mps-control"):
        stub = folder / program
        stub.write_text(f'#!/bin/sh\necho "{program} $*"\n')
        stub.chmod(0o755)
    if ranks is not None:
        (folder / "mpirun").write_text(MPIRUN.replace("RANKS", str(ranks)))
    python = Path(sys.executable).parent
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "PATH": f"{folder}:{python}:{os.environ['PATH']}",
        "TMPDIR": str(folder),
    }
    return subprocess.run(
        [str(a) for a in arguments], env=environment, capture_output=True, text=True, timeout=60
    )


needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler"
)


def test_no_driver_means_no_gpu(tmp_path):
    (tmp_path / "libcuda.so.1").write_text("not a library")
    assert run(tmp_path, sys.executable, LAUNCH / "gpus.py").stdout.split() == ["0", "0", "0"]
    refused = run(tmp_path, "bash", LAUNCH / "gpu.sh", "true")
    assert refused.returncode == 2
    assert "no GPU found" in refused.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("gpus", "fails", "found"), [(3, 0, "3 100 13"), (0, 0, "0 0 0"), (3, 100, "0 0 0")]
)
def test_gpus_are_counted_by_the_driver(tmp_path, gpus, fails, found):
    result = run(tmp_path, sys.executable, LAUNCH / "gpus.py", gpus=gpus, fails=fails)
    assert result.stdout.strip() == found


@needs_compiler
def test_ranks_that_do_not_fit_are_refused_with_what_would(tmp_path):
    refused = run(tmp_path, "bash", LAUNCH / "gpu.sh", "-n", 8, "--sms", 26, "true", gpus=2)
    assert refused.returncode == 2
    assert "4 ranks on a GPU x 26 SMs" in refused.stderr
    assert "--sms 25 or less" in refused.stderr
    assert "mpirun" not in refused.stdout


@needs_compiler
@pytest.mark.parametrize(("ranks", "starts_mps"), [(8, True), (2, False)])
def test_mps_runs_where_ranks_share_a_gpu_and_ends_with_the_job(tmp_path, ranks, starts_mps):
    done = run(tmp_path, "bash", LAUNCH / "gpu.sh", "-n", ranks, "program", "argument", gpus=2)
    assert done.returncode == 0, done.stderr
    assert f"mpirun -n {ranks}" in done.stdout
    assert done.stdout.rstrip().endswith("rank program argument")
    assert ("nvidia-cuda-mps-control -d" in done.stdout) == starts_mps
    assert not list(tmp_path.glob("epcomm-mps.*"))


@needs_compiler
@pytest.mark.parametrize(("ranks", "used"), [(8, "00001111"), (3, "001"), (2, "01"), (1, "0")])
def test_ranks_fill_one_gpu_after_the_other(tmp_path, ranks, used):
    show = ("sh", "-c", "echo GPU $CUDA_VISIBLE_DEVICES")
    done = run(tmp_path, "bash", LAUNCH / "gpu.sh", "-n", ranks, *show, gpus=2, ranks=ranks)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    assert lines == [f"GPU {gpu}" for gpu in used]
