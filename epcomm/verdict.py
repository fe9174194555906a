"""From everybody's announcements to the error of a call that must not move data."""

import numpy as np

from .errors import MismatchError, PeerError
from .native import constants

#: Fields that must be the same on every rank, with the words for them.
_AGREED = {
    "op": "the operation called",
    "epoch": "the number of calls made so far",
    "format": "the format of the rows",
    "layout": "layout",
    "alignment": "alignment",
    "with_weights": "whether top-k weights are given",
    "fixed_rows": "fixed_rows",
    "wire": "wire",
    "handle_epoch": "the dispatch the handle belongs to",
}


def find_error(headers: np.ndarray, rank: int) -> PeerError | None:
    """What to raise on ``rank``: the same on all ranks that did nothing wrong.

    Args:
        headers: announcements by rank, structured [R].
        rank: this rank.

    Returns:
        None where the call may go on, or where only this rank refused: its own error says more.
    """
    refused = np.flatnonzero(headers["status"] == constants["STATUS_REFUSED"])
    others = [int(r) for r in refused if r != rank]
    if others:
        reasons = "; ".join(f"rank {r}: {_reason(headers[r])}" for r in others)
        return PeerError(
            f"refused by {len(others)} other rank(s), nothing was sent: {reasons}", tuple(others)
        )
    if refused.size:
        return None
    for field, words in _AGREED.items():
        values, first, counts = np.unique(headers[field], return_index=True, return_counts=True)
        if len(values) == 1:
            continue
        # The most common value is taken for the intended one; on a tie the lowest rank's.
        usual = min(range(len(values)), key=lambda v: (-counts[v], first[v]))
        odd = np.flatnonzero(headers[field] != values[usual])
        one, other = int(first[usual]), int(odd[0])
        return MismatchError(
            f"ranks disagree about {words}, nothing was sent: "
            f"rank {one} has {_name(field, values[usual])}, "
            f"rank {other} has {_name(field, headers[field][other])}",
            tuple(int(r) for r in odd),
        )
    return None


def _reason(header: np.void) -> str:
    # A check on the device has no words to send.
    given: str = header["reason"].decode(errors="replace")
    return given or "topk_idx: an expert id is out of range or twice in a row"


def _name(field: str, value: int) -> str:
    prefix = {"op": "OP_", "format": "FORMAT_", "wire": "FORMAT_", "layout": "LAYOUT_"}.get(field)
    for name, number in constants.items():
        if prefix and name.startswith(prefix) and number == value:
            return name.removeprefix(prefix).lower()
    return str(int(value))
