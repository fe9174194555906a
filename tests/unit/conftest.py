"""Fixtures of several files."""

from typing import Any

import pytest


@pytest.fixture
def gpu() -> Any:
    """A stand-in for a GPU; see cuda_stand_ins.py."""
    from cuda_stand_ins import Gpu

    return Gpu()


@pytest.fixture
def buffer(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> Any:
    """A buffer on that GPU."""
    from cuda_stand_ins import make_buffer

    return make_buffer(monkeypatch, gpu)
