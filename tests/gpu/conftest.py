"""The tests of the CUDA back end use the harness of the MPI tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "mpi"))
