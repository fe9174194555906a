"""From what the kernels report to the exceptions of epcomm.errors."""

import numpy as np

from .. import native
from ..cpu.announce import _AGREED, _name
from ..errors import EpcommError, MismatchError, PeerError, PeerTimeoutError
from . import abi
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
    if verdict == abi.constants["REFUSED"]:
        ranks = [int(r) for r in np.flatnonzero(headers["status"]) if r != engine.shape.rank]
        reasons = "; ".join(
            f"rank {r}: {headers['reason'][r].decode(errors='replace') or 'bad topk_idx'}"
            for r in ranks
        )
        return PeerError(
            f"refused by {len(ranks)} other rank(s), nothing was sent: {reasons}", tuple(ranks)
        )
    for field, words in _AGREED.items():
        values = headers[field]
        different = np.flatnonzero(values != values[0])
        if different.size:
            r = int(different[0])
            return MismatchError(
                f"ranks disagree about {words}, nothing was sent: "
                f"rank 0 has {_name(field, values[0])}, rank {r} has {_name(field, values[r])}",
                tuple(int(d) for d in different),
            )
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
