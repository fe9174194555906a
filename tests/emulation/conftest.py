"""The emulated kernels are compiled once for a test run; cases come from the MPI tests."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "mpi")]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The library of emulated kernels."""
    from world import build

    return build(str(tmp_path_factory.mktemp("emulated")))
