"""A rank that stays until it is ended: ``sleep.py FOLDER``, where it writes up.RANK."""

import sys
import time
from pathlib import Path

from mpi4py import MPI

(Path(sys.argv[1]) / f"up.{MPI.COMM_WORLD.rank}").touch()
time.sleep(100.0)
