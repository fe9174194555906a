"""From what the kernels report to the exceptions of epcomm.errors."""

import numpy as np

from .. import native
from ..errors import EpcommError, PeerTimeoutError
from ..verdict import find_error
from .engine import Engine

_PHASES = {
    "PHASE_ANNOUNCE": "announcing",
    "PHASE_ARRIVE": "storing its rows",
    "PHASE_RELEASE": "reading rows",
}


def refusal(engine: Engine, epoch: int, verdict: int) -> EpcommError:
    """The error of a call that ended before data moved, for a rank that did nothing wrong."""
    num_ranks = engine.shape.num_ranks
    headers = np.stack([engine.announcement_of(r, epoch) for r in range(num_ranks)])
    error = find_error(headers, engine.shape.rank)
    if error is not None:
        return error
    return EpcommError(f"the kernels refused the call (verdict {verdict})")


def timeout(engine: Engine) -> PeerTimeoutError:
    """The error of a buffer whose kernels gave up."""
    error = engine.error()
    assert error is not None
    names = {number: name for name, number in native.constants.items() if name.startswith("PHASE_")}
    phase = names.get(int(error["phase"]), "")
    rank = int(error["rank"])
    return PeerTimeoutError(
        f"rank {int(error['reporter'])} waited too long for rank {rank} "
        f"{_PHASES.get(phase, phase)}: call {int(error['epoch'])}, block {int(error['channel'])}, "
        f"expected {int(error['expected'])}, seen {int(error['seen'])}",
        (rank,),
    )
