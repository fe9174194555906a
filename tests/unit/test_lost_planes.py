"""Planes that lanes were moved off are said once each."""

import ctypes
import types
import warnings

import pytest

from epcomm.errors import FabricError
from epcomm.fabric import fabric as module
from epcomm.fabric.abi import constants, dtypes


class Library:
    """The functions of the library that a check calls, with losses made up."""

    def __init__(self):
        self.losses: list[tuple[int, bytes]] = []
        self.failed = 0

    def epcomm_fabric_check(self, end, stall_ns):
        return self.failed

    def epcomm_fabric_num_losses(self, end):
        return len(self.losses)

    def epcomm_fabric_loss_text(self, end, index, peer):
        if index >= 2:
            return None
        ctypes.cast(peer, ctypes.POINTER(ctypes.c_int32))[0] = self.losses[index][0]
        return self.losses[index][1]


@pytest.fixture
def fabric(monkeypatch):
    library = Library()
    monkeypatch.setattr(module, "library", library)
    fabric = module.Fabric.__new__(module.Fabric)
    fabric.topology = types.SimpleNamespace(rail=(1, 5, 9), node=0, num_nodes=3)
    fabric._open_end, fabric._warned = 1, 0
    return fabric, library


def warnings_of(fabric) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fabric.check()
    return [str(w.message) for w in caught]


def test_every_loss_is_said_once(fabric):
    fabric, library = fabric
    assert warnings_of(fabric) == []
    library.losses = [(2, b"plane 1 is dead: no answer (channel 3)")]
    (line,) = warnings_of(fabric)
    assert line == (
        "fabric: to rank 9, node 2: plane 1 is dead: no answer (channel 3); other planes take over"
    )
    assert warnings_of(fabric) == []
    library.losses.append((1, b"plane 0 is dead: no answer (channel 0)"))
    (line,) = warnings_of(fabric)
    assert "to rank 5, node 1: plane 0" in line
    assert len(fabric.lost_planes) == 2


def test_losses_whose_records_were_not_kept_are_said(fabric):
    fabric, library = fabric
    library.losses = [(1, b"plane 0 is dead")] * 4
    lines = warnings_of(fabric)
    assert len(lines) == 3
    assert "more planes are dead" in lines[-1]
    assert warnings_of(fabric) == []


def test_losses_are_said_before_the_failure(fabric):
    fabric, library = fabric
    library.losses, library.failed = [(1, b"plane 0 is dead")], constants["TRANSPORT"]
    state = ctypes.create_string_buffer(dtypes["state"].itemsize)
    fabric._memory = types.SimpleNamespace(host=ctypes.addressof(state))
    with pytest.warns(RuntimeWarning, match="plane 0"), pytest.raises(FabricError):
        fabric.check()
