"""How many windows a buffer makes, and how large."""

#: Windows to receive into that are made at once: calls overlap, and not every call can ask.
RECEIVE_WINDOWS = 4
#: Windows to combine from.
EXPOSED_WINDOWS = 2
#: Windows are a multiple of this.
_STEP = 2 << 20


def window_bytes(needed: int) -> int:
    """Size of a window made for ``needed`` bytes: a quarter more, so that it grows seldom."""
    return max(1, -(-(needed + needed // 4) // _STEP)) * _STEP
