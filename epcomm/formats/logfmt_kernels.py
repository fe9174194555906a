"""LogFMT rows: float32 to packed logarithmic codes and back.

The meaning is :mod:`.reference`. Every loop over elements has the fixed length of a tile, and what
a tile needs once (logarithms of its bounds, divisions) is computed in a loop over the tiles of the
row, so that all of it becomes vector code. A partial last tile is padded with zeros in a buffer:
they change neither its bounds nor its bytes. Arguments are contiguous 1-D arrays; ``bits`` is 8
or 10.

Tiles are addressed as (array, start) with unsigned indices: a slice would cost reference counting,
and a signed index a test for negative values, in every tile.
"""

import numpy as np
from numpy.typing import NDArray

from .bits import bits_f32, f32_bits, i32, kernel, uint
from .constants import (
    EXP2_POLYNOMIAL,
    F32_NAN_BITS,
    LINEAR_ROUNDING,
    LOG2_POLYNOMIAL,
    LOG2_SPLIT_BITS,
    LOGFMT_EXPONENT_MAX,
    LOGFMT_EXPONENT_MIN,
    LOGFMT_LARGEST,
    LOGFMT_RANGE_LOG2,
    ROUND_MAGIC,
    ROUND_MAGIC_BITS,
    TILE,
)

_L0, _L1, _L2, _L3, _L4, _L5, _L6 = LOG2_POLYNOMIAL
_E0, _E1, _E2, _E3, _E4, _E5 = EXP2_POLYNOMIAL
_A, _B = LINEAR_ROUNDING
_ZERO = np.float32(0)
_ONE = np.float32(1)
_NAN = np.float32(np.nan)
_INF_BITS = i32(0x7F800000)
_NO_BITS = i32(0x7FFFFFFF)
_SIGN = i32(-(2**31))
# Below this maximum a tile is lifted by 2^64; above it, subnormals lie under the tile's range.
_LIFT_BELOW = np.float32(-64.0)
_LIFT = np.float32(2.0**64)
_LIFT_LOG2 = i32(64)


@kernel
def _log2_normal(magnitude: np.int32, offset: np.int32) -> np.float32:
    """log2 of a normal magnitude's bit pattern, plus ``offset``.

    Zero and subnormals give some number between -127 and -126, plus ``offset``.
    """
    e = i32(i32(magnitude - LOG2_SPLIT_BITS) >> 23)
    f = bits_f32(i32(magnitude - i32(e << 23))) - _ONE
    p = _L6
    p = p * f + _L5
    p = p * f + _L4
    p = p * f + _L3
    p = p * f + _L2
    p = p * f + _L1
    p = p * f + _L0
    return np.float32(i32(e + offset)) + p * f


@kernel
def _log2(magnitude: np.int32) -> np.float32:
    """log2 of a magnitude's bit pattern; see ``reference.log2_magnitude``."""
    is_subnormal = magnitude < 0x00800000
    normal = f32_bits(np.float32(magnitude)) if is_subnormal else magnitude
    return _log2_normal(normal, i32(-149) if is_subnormal else i32(0))


@kernel
def _bf16_down(x: np.float32) -> np.float32:
    bits = f32_bits(x)
    return bits_f32(i32(i32(bits + i32(i32(bits >> 31) & 0xFFFF)) & i32(-0x10000)))


@kernel
def _bf16_up(x: np.float32) -> np.float32:
    return -_bf16_down(-x)


@kernel
def _bounds(x: NDArray, start: int) -> tuple[np.int32, np.int32]:
    """(smallest nonzero, largest) magnitude bits of a tile; an all-zero one has _NO_BITS, 0."""
    smallest, largest = _NO_BITS, i32(0)
    for i in range(TILE):
        a = i32(f32_bits(x[uint(start + i)]) & 0x7FFFFFFF)
        largest = max(largest, a)
        smallest = min(smallest, _NO_BITS if a == 0 else a)
    return smallest, largest


@kernel
def _encoding(
    smallest: NDArray,
    largest: NDArray,
    bits: int,
    los: NDArray,
    his: NDArray,
    inverses: NDArray,
    constants: NDArray,
) -> None:
    """Fill what each tile is encoded with; lo = hi = NaN for a non-finite tile, 0 for zeros."""
    levels = np.float32((1 << (bits - 1)) - 1)
    for tile in range(largest.size):
        top = largest[tile]
        hi = _bf16_up(_log2(top))
        lo = _bf16_down(_log2(smallest[tile]))
        lowest = _bf16_up(hi - LOGFMT_RANGE_LOG2)
        lo = lo if lo > lowest else lowest
        spread = hi - lo
        inverses[tile] = (levels - _ONE) / spread if spread > _ZERO else _ZERO
        step = spread / (levels - _ONE)
        constants[tile] = _A - _B * step
        lo = _ZERO if top == 0 else lo
        hi = _ZERO if top == 0 else hi
        los[tile] = _NAN if top >= _INF_BITS else lo
        his[tile] = _NAN if top >= _INF_BITS else hi


@kernel
def _quantize(
    x: NDArray,
    start: int,
    offset: np.int32,
    lo: np.float32,
    inverse: np.float32,
    constant: np.float32,
    bits: int,
    codes: NDArray,
) -> None:
    """Fill the 128 codes, sign included; ``offset`` is added to the logarithms."""
    sign_mask = i32(1 << (bits - 1))
    levels = np.float32((1 << (bits - 1)) - 1)
    zero_below = lo - _ONE
    for i in range(TILE):
        b = f32_bits(x[uint(start + i)])
        log2 = _log2_normal(i32(b & 0x7FFFFFFF), offset)
        code = (log2 - lo) * inverse + constant
        code = code if code > _ONE else _ONE
        code = code if code < levels else levels
        k = i32(0) if log2 < zero_below else i32(code)
        codes[uint(i)] = i32(k | i32(i32(b >> 31) & sign_mask))


@kernel
def _encode_tile(
    x: NDArray,
    start: int,
    lo: np.float32,
    hi: np.float32,
    inverse: np.float32,
    constant: np.float32,
    bits: int,
    codes: NDArray,
) -> None:
    if lo != lo:
        for i in range(TILE):
            codes[uint(i)] = 0
    elif hi > _LIFT_BELOW:
        _quantize(x, start, i32(0), lo, inverse, constant, bits, codes)
    else:
        lifted = np.empty(TILE, np.float32)
        for i in range(TILE):
            lifted[i] = x[start + i] * _LIFT
        _quantize(lifted, 0, i32(-_LIFT_LOG2), lo, inverse, constant, bits, codes)


@kernel
def _dequantize(
    codes: NDArray, lo: np.float32, hi: np.float32, bits: int, out: NDArray, start: int
) -> None:
    """Fill the 128 values of a tile whose bounds are numbers."""
    magnitude_mask = i32((1 << (bits - 1)) - 1)
    step = (hi - lo) / np.float32((1 << (bits - 1)) - 2)
    whole = min(max(lo, LOGFMT_EXPONENT_MIN), LOGFMT_EXPONENT_MAX)
    whole = (whole + ROUND_MAGIC) - ROUND_MAGIC
    base = lo - whole
    scale = bits_f32(i32(i32(i32(whole) + 127) << 23))
    for i in range(TILE):
        code = i32(codes[uint(i)])
        k = i32(code & magnitude_mask)
        log2 = np.float32(i32(k - 1)) * step + base
        shifted = log2 + ROUND_MAGIC
        f = log2 - (shifted - ROUND_MAGIC)
        p = _E5
        p = p * f + _E4
        p = p * f + _E3
        p = p * f + _E2
        p = p * f + _E1
        p = p * f + _E0
        exponent = i32(i32(f32_bits(shifted) - ROUND_MAGIC_BITS) << 23)
        y = bits_f32(i32(f32_bits(p) + exponent)) * scale
        y = LOGFMT_LARGEST if y > LOGFMT_LARGEST else y
        y_bits = i32(0) if k == 0 else f32_bits(y)
        sign = _SIGN if code > magnitude_mask else i32(0)
        out[uint(start + i)] = bits_f32(i32(y_bits | sign))


@kernel
def _pack(codes: NDArray, bits: int, out_u8: NDArray, start: int) -> None:
    if bits == 8:
        for i in range(TILE):
            out_u8[uint(start + i)] = codes[uint(i)]
        return
    # Four 10-bit codes to five bytes.
    for g in range(TILE // 4):
        c0, c1 = codes[uint(4 * g)], codes[uint(4 * g + 1)]
        c2, c3 = codes[uint(4 * g + 2)], codes[uint(4 * g + 3)]
        word = np.int64(c0) | np.int64(c1) << 10 | np.int64(c2) << 20 | np.int64(c3) << 30
        at = start + 5 * g
        out_u8[uint(at)] = word & 0xFF
        out_u8[uint(at + 1)] = (word >> 8) & 0xFF
        out_u8[uint(at + 2)] = (word >> 16) & 0xFF
        out_u8[uint(at + 3)] = (word >> 24) & 0xFF
        out_u8[uint(at + 4)] = (word >> 32) & 0xFF


@kernel
def _unpack(in_u8: NDArray, start: int, bits: int, codes: NDArray) -> None:
    if bits == 8:
        for i in range(TILE):
            codes[uint(i)] = in_u8[uint(start + i)]
        return
    for g in range(TILE // 4):
        at = start + 5 * g
        b0, b1 = i32(in_u8[uint(at)]), i32(in_u8[uint(at + 1)])
        b2, b3 = i32(in_u8[uint(at + 2)]), i32(in_u8[uint(at + 3)])
        b4 = i32(in_u8[uint(at + 4)])
        codes[uint(4 * g)] = i32(b0 | i32(i32(b1 & 0x03) << 8))
        codes[uint(4 * g + 1)] = i32(i32(b1 >> 2) | i32(i32(b2 & 0x0F) << 6))
        codes[uint(4 * g + 2)] = i32(i32(b2 >> 4) | i32(i32(b3 & 0x3F) << 4))
        codes[uint(4 * g + 3)] = i32(i32(b3 >> 6) | i32(b4 << 2))


@kernel
def _put_bf16(x: np.float32, out_u8: NDArray, at: int) -> None:
    bits = f32_bits(x)
    out_u8[at] = (bits >> 16) & 0xFF
    out_u8[at + 1] = (bits >> 24) & 0xFF


@kernel
def _get_bf16(in_u8: NDArray, at: int) -> np.float32:
    return bits_f32(i32(i32(i32(in_u8[at]) << 16) | i32(i32(in_u8[at + 1]) << 24)))


@kernel
def logfmt_pack_row(x_f32: NDArray, bits: int, out_u8: NDArray) -> None:
    """Encode a float32 row into ``logfmt_row_bytes(x_f32.size, bits)`` bytes."""
    whole_tiles, rest = divmod(x_f32.size, TILE)
    tiles = whole_tiles + (1 if rest else 0)
    tile_bytes = TILE * bits // 8
    metadata = whole_tiles * tile_bytes + (rest * bits + 7) // 8
    padded = np.zeros(TILE, np.float32)
    for i in range(rest):
        padded[i] = x_f32[whole_tiles * TILE + i]

    smallest, largest = np.empty(tiles, np.int32), np.empty(tiles, np.int32)
    for tile in range(whole_tiles):
        smallest[tile], largest[tile] = _bounds(x_f32, tile * TILE)
    if rest:
        smallest[whole_tiles], largest[whole_tiles] = _bounds(padded, 0)
    los, his = np.empty(tiles, np.float32), np.empty(tiles, np.float32)
    inverses, constants = np.empty(tiles, np.float32), np.empty(tiles, np.float32)
    _encoding(smallest, largest, bits, los, his, inverses, constants)

    codes = np.empty(TILE, np.int32)
    for tile in range(tiles):
        lo, hi, inverse, constant = los[tile], his[tile], inverses[tile], constants[tile]
        if tile < whole_tiles:
            _encode_tile(x_f32, tile * TILE, lo, hi, inverse, constant, bits, codes)
            _pack(codes, bits, out_u8, tile * tile_bytes)
        else:
            packed = np.empty(tile_bytes, np.uint8)
            _encode_tile(padded, 0, lo, hi, inverse, constant, bits, codes)
            _pack(codes, bits, packed, 0)
            for i in range(metadata - tile * tile_bytes):
                out_u8[tile * tile_bytes + i] = packed[i]
        _put_bf16(lo, out_u8, metadata + 4 * tile)
        _put_bf16(hi, out_u8, metadata + 4 * tile + 2)


@kernel
def logfmt_unpack_row(in_u8: NDArray, bits: int, out_f32: NDArray) -> None:
    """Decode the bytes that :func:`logfmt_pack_row` wrote for ``out_f32.size`` elements."""
    whole_tiles, rest = divmod(out_f32.size, TILE)
    tile_bytes = TILE * bits // 8
    metadata = whole_tiles * tile_bytes + (rest * bits + 7) // 8
    codes = np.empty(TILE, np.int32)
    for tile in range(whole_tiles + (1 if rest else 0)):
        lo, hi = _get_bf16(in_u8, metadata + 4 * tile), _get_bf16(in_u8, metadata + 4 * tile + 2)
        start = tile * TILE
        if lo != lo or hi != hi:
            for i in range(start, min(start + TILE, out_f32.size)):
                out_f32[i] = bits_f32(i32(F32_NAN_BITS))
        elif tile < whole_tiles:
            _unpack(in_u8, tile * tile_bytes, bits, codes)
            _dequantize(codes, lo, hi, bits, out_f32, start)
        else:
            packed, padded = np.zeros(tile_bytes, np.uint8), np.empty(TILE, np.float32)
            for i in range(metadata - tile * tile_bytes):
                packed[i] = in_u8[tile * tile_bytes + i]
            _unpack(packed, 0, bits, codes)
            _dequantize(codes, lo, hi, bits, padded, 0)
            for i in range(rest):
                out_f32[start + i] = padded[i]
