"""Where the time of a call goes, by the clock of the GPU."""

from . import abi
from .engine import Engine

_FIRST = (
    ("layout", "START", "COUNTED"),
    ("announce", "COUNTED", "ANNOUNCED"),
    ("place", "ANNOUNCED", "PLACED"),
    ("store", "PLACED", "MOVED"),
    ("arrive", "MOVED", "END"),
)
_CACHED = (
    ("announce", "START", "ANNOUNCED"),
    ("store", "ANNOUNCED", "MOVED"),
    ("arrive", "MOVED", "END"),
)
_COMBINE = (
    ("announce", "START", "ANNOUNCED"),
    ("reduce", "ANNOUNCED", "MOVED"),
    ("release", "MOVED", "END"),
)


def read_phases(
    engine: Engine, number: int, first: bool, *, combines: bool = False
) -> dict[str, float]:
    """Seconds by phase of a finished call; empty if too many calls were made since.

    Args:
        engine: of the buffer.
        number: of the call.
        first: a dispatch that counted.
        combines: a combine.
    """
    at = engine.times(number)
    if at is None:
        return {}
    phases = _COMBINE if combines else _FIRST if first else _CACHED
    moments = {name: at[abi.constants[f"STAMP_{name}"]] for _, *pair in phases for name in pair}
    return {name: 1e-9 * (moments[end] - moments[begin]) for name, begin, end in phases}
