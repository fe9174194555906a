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


# LogFMT's logarithm and exponential: minimax polynomials, coefficients of rising power, evaluated
# by Horner's rule. Absolute error of LOG2 is 3e-7 (before the exponent is added), relative error
# of EXP2 1e-7; both are exact at powers of two.
LOG2_SPLIT_BITS = 0x3F3504F3
"""sqrt(1/2): magnitudes are split into 2^e * m with m in [sqrt(1/2), sqrt(2))."""

LOG2_POLYNOMIAL: tuple[np.float32, ...] = tuple(
    np.float32(c)
    for c in (
        1.44269967,
        -0.72137588,
        0.48046502,
        -0.35896185,
        0.29726261,
        -0.2726979,
        0.17063443,
    )
)
"""log2(1 + f) / f."""

EXP2_POLYNOMIAL: tuple[np.float32, ...] = tuple(
    np.float32(c) for c in (1.0, 0.69314724, 0.24022235, 0.055503085, 0.0096718753, 0.0013407259)
)
"""2^f for f in [-1/2, 1/2]."""

ROUND_MAGIC = np.float32(1.5 * 2**23)
"""Adding it rounds |x| < 2^22 to an integer, found in the low bits of the sum."""
ROUND_MAGIC_BITS = 0x4B400000

LINEAR_ROUNDING: tuple[np.float32, ...] = (np.float32(1.5), np.float32(0.0866434))
"""(a, b) of LogFMT's rounding constant a - b * step, with b = ln(2) / 8; see the reference."""

LOGFMT_EXPONENT_MIN = np.float32(-126.0)
LOGFMT_EXPONENT_MAX = np.float32(96.0)
"""Range of the power of two a LogFMT decoder sets apart, so that the rest stays normal."""

LOGFMT_LARGEST = np.float32(2.0**127 * (2 - 2**-7))
"""The largest finite BF16; decoders saturate there, as the rounded-up maximum may exceed it."""


def logfmt_tile_bytes(length: int, bits: int) -> int:
    """Count the bytes of the codes of a tile of ``length`` elements."""
    return (length * bits + 7) // 8


def logfmt_code_bytes(hidden: int, bits: int) -> int:
    """Count the bytes of the codes of a row; every tile ends on a byte."""
    full, rest = divmod(hidden, TILE)
    return full * logfmt_tile_bytes(TILE, bits) + logfmt_tile_bytes(rest, bits)
