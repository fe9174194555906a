"""Launchers that start together compile the kernels one after the other, and only once."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Stands for the compilation: says when it starts and ends, and takes a while.
PYTHON = """#!/bin/sh
echo start >>"$LOG"; sleep 0.5; echo end >>"$LOG"
"""


def test_two_launchers_at_once(tmp_path):
    for folder in ("launch", "epcomm/cpu", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "launch/env.sh", tmp_path / "launch")
    (tmp_path / "epcomm/kernels.py").touch()
    python = tmp_path / "bin/python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    log = tmp_path / "log"
    environment = os.environ | {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "LOG": str(log),
        "EPCOMM_READY": "1",  # nothing to install
    }
    command = ["bash", "-c", "source launch/env.sh; warm_up"]
    launchers = [subprocess.Popen(command, cwd=tmp_path, env=environment) for _ in range(3)]
    assert [launcher.wait(60) for launcher in launchers] == [0, 0, 0]
    assert log.read_text().split() == ["start", "end"]
