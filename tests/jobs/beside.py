"""A rank of a job beside another one: ``beside.py FOLDER OTHER_FOLDER SEED``.

Writes RANK.pid and, once its first call has been checked, 'up'; goes on when the other job is up
too. SEED makes the two jobs' tokens differ, so that a row of the other one would be noticed.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "mpi"))

from harness import Case, check, make_buffer
from mpi4py import MPI


def main(folder: Path, other: Path, seed: int) -> None:
    comm = MPI.COMM_WORLD
    (folder / f"{comm.rank}.pid").write_text(str(os.getpid()))
    case = Case(max(1, comm.size // 2), hidden=256, tokens=(40,), seed=1000 * seed)
    buffer = make_buffer(comm, case)
    check(comm, case, buffer)
    if comm.rank == 0:
        (folder / "up").touch()
        deadline = time.monotonic() + 60.0
        while not (other / "up").exists():
            assert time.monotonic() < deadline, "the other job did not start"
            time.sleep(0.01)
    comm.Barrier()
    # New Buffers too, so that both jobs make and share memory at the same time.
    for turn in range(3):
        for call in range(3):
            check(comm, replace(case, seed=case.seed + 10 * turn + call), buffer)
        buffer.close()
        buffer = make_buffer(comm, case)
    buffer.close()
    if comm.rank == 0:
        (folder / "done").touch()


main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
