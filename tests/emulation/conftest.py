"""The emulated kernels are compiled once for a test run; cases come from the MPI tests."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "mpi")]


def pytest_collection_modifyitems(items):
    """Count a test's own time, not the compiler's, which has its own limit."""
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        own = item.get_closest_marker("timeout")
        seconds = own.args[0] if own else float(item.config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(seconds, func_only=True), append=False)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The library of emulated kernels."""
    from world import build

    return build(str(tmp_path_factory.mktemp("emulated")))


@pytest.fixture(scope="session")
def one_node(tmp_path_factory):
    """The library of emulated kernels inside a node."""
    from one_node import build

    return build(str(tmp_path_factory.mktemp("one_node")))
