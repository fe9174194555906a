"""The numbers that define the wire formats, shared by the reference and the kernels."""

import numpy as np

TILE = 128
"""Elements of a quantisation tile, along hidden."""

FP8_MAX = np.float32(448.0)
FP8_AMAX_FLOOR = np.float32(1e-4)

LOGFMT_RANGE_LOG2 = np.float32(32.0)
"""Widest log2(max / min) a LogFMT tile may span."""

F32_NAN_BITS = 0x7FC00000
"""The one NaN (and its negative) that decoders produce."""


def tiles_of(hidden: int) -> int:
    """Count the tiles of a row of ``hidden`` elements; the last may be partial."""
    return -(-hidden // TILE)
