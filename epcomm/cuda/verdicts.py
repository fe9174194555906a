"""From what the kernels report to the exceptions of epcomm.errors."""

from .. import native
from ..errors import EpcommError, PeerTimeoutError
from ..verdict import find_error
from . import abi
from .engine import Engine

_PHASES = {
    "PHASE_ANNOUNCE": "announcing",
    "PHASE_DATA": "sending its records",
    "PHASE_RETURN": "sending records back",
    "PHASE_ARRIVE": "storing its rows",
    "PHASE_RELEASE": "reading rows",
}


def refusal(engine: Engine, verdict: int, epoch: int | None = None) -> EpcommError:
    """The error of a call that ended before data moved, for a rank that did nothing wrong.

    Args:
        engine: of the buffer.
        verdict: the kernels'.
        epoch: of the last call; None: the one that the report tells of.
    """
    error = find_error(engine.announcements(epoch), engine.shape.rank)
    if error is not None:
        return error
    if verdict == abi.constants["STALE"]:
        return EpcommError("the dispatch that made the handle was refused; nothing was sent")
    return EpcommError(f"the kernels refused the call (verdict {verdict})")


def timeout(engine: Engine) -> EpcommError:
    """The error of a buffer whose kernels gave up."""
    error = engine.error()
    assert error is not None
    if error.verdict == abi.constants["FABRIC"] and engine.scale_out is not None:
        return engine.scale_out.failure()
    names = {number: name for name, number in native.constants.items() if name.startswith("PHASE_")}
    phase = names.get(error.phase, "")
    rank = error.rank
    return PeerTimeoutError(
        f"rank {error.reporter} waited too long for rank {rank} "
        f"{_PHASES.get(phase, phase)}: call {error.epoch}, block {error.channel}, "
        f"expected {error.expected}, seen {error.seen}",
        (rank,),
    )
