"""The numbers that define the wire formats, shared by the reference and the kernels.

Their values, and what each is for, stand in ``csrc/protocol/formats.h``.
"""

import re

import numpy as np

from ..native import constants, numbers

TILE = constants["limit_tile"]
"""Elements of a quantisation tile, along hidden."""

F32_NAN_BITS = 0x7FC00000
"""The one NaN (and its negative) that decoders produce."""


def _bits(x: np.float32) -> int:
    return int(x.view(np.int32))


def _series(name: str) -> tuple[np.float32, ...]:
    """``name_0``, ``name_1`` and so on."""
    return tuple(value for key, value in numbers.items() if re.fullmatch(rf"{name}_\d+", key))


FP8_MAX = numbers["fp8_max"]
FP8_AMAX_FLOOR = numbers["fp8_amax_floor"]

LOGFMT_RANGE_LOG2 = numbers["logfmt_range"]
LOGFMT_LARGEST = numbers["logfmt_largest"]
LOGFMT_EXPONENT_MIN = numbers["logfmt_exponent_min"]
LOGFMT_EXPONENT_MAX = numbers["logfmt_exponent_max"]
LINEAR_ROUNDING = _series("linear")
LOG2_POLYNOMIAL = _series("log2")
LOG2_SPLIT_BITS = _bits(numbers["log2_split"])
EXP2_POLYNOMIAL = _series("exp2")
ROUND_MAGIC = numbers["round_magic"]
ROUND_MAGIC_BITS = _bits(ROUND_MAGIC)


def tiles_of(hidden: int) -> int:
    """Count the tiles of a row of ``hidden`` elements; the last may be partial."""
    return -(-hidden // TILE)


def logfmt_tile_bytes(length: int, bits: int) -> int:
    """Count the bytes of the codes of a tile of ``length`` elements."""
    return (length * bits + 7) // 8


def logfmt_code_bytes(hidden: int, bits: int) -> int:
    """Count the bytes of the codes of a row; every tile ends on a byte."""
    full, rest = divmod(hidden, TILE)
    return full * logfmt_tile_bytes(TILE, bits) + logfmt_tile_bytes(rest, bits)
