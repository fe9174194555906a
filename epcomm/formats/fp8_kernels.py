"""FP8 E4M3 rows with one scale per tile of 128: pack from BF16 or float32, unpack.

The meaning is :mod:`.reference`; here the rounding is done on bit patterns, without a branch or a
table, so that every loop becomes vector code. All arguments are contiguous 1-D arrays; ``q_u8``
and the unpacked row have ``hidden`` elements, ``s_f32`` has ``ceil(hidden / 128)`` and ``s_u8``
that number rounded up to a multiple of four (the unused bytes are written as 0).
"""

import numpy as np
from numpy.typing import NDArray

from .bits import bits_f32, f32_bits, i32, kernel
from .constants import FP8_AMAX_FLOOR, FP8_MAX, TILE

_MIN_NORMAL_BITS = i32(0x3C800000)  # 2^-6
# Adding 2^14 leaves a last place of 2^-9, E4M3's smallest step: the adder itself rounds.
_SUBNORMAL_MAGIC = np.float32(16384.0)
_SUBNORMAL_MAGIC_BITS = i32(0x46800000)
_SUBNORMAL_STEP = np.float32(2.0**-9)


@kernel
def _e4m3(y: np.float32) -> np.int32:
    """Magnitude code of ``y``, nearest even; the scale ensures that |y| rounds to at most 448."""
    u = i32(f32_bits(y) & 0x7FFFFFFF)
    normal = i32(i32(u + i32(0x7FFFF + i32(i32(u >> 20) & 1))) >> 20) - i32(120 << 3)
    tiny = i32(f32_bits(bits_f32(u) + _SUBNORMAL_MAGIC) - _SUBNORMAL_MAGIC_BITS)
    return tiny if u < _MIN_NORMAL_BITS else i32(normal)


@kernel
def _scale_f32(amax_bits: np.int32) -> tuple[np.float32, np.float32]:
    """(factor, scale) of a tile."""
    amax = max(bits_f32(amax_bits), FP8_AMAX_FLOOR)
    return FP8_MAX / amax, amax / FP8_MAX


@kernel
def _scale_ue8m0(amax_bits: np.int32) -> tuple[np.float32, np.int32]:
    """(factor, biased exponent of the scale) of a tile."""
    bits = f32_bits(max(bits_f32(amax_bits), FP8_AMAX_FLOOR) / FP8_MAX)
    exponent = i32(i32(bits + 0x7FFFFF) >> 23)
    return bits_f32(i32(i32(254 - exponent) << 23)), exponent


@kernel
def _amax_bf16(x_u16: NDArray) -> np.int32:
    """Bit pattern, as float32, of the largest finite magnitude."""
    largest = i32(0)
    for i in range(x_u16.size):
        a = i32(x_u16[i] & 0x7FFF)
        largest = max(largest, a if a < 0x7F80 else i32(0))
    return i32(largest << 16)


@kernel
def _amax_f32(x_f32: NDArray) -> np.int32:
    largest = i32(0)
    for i in range(x_f32.size):
        a = i32(f32_bits(x_f32[i]) & 0x7FFFFFFF)
        largest = max(largest, a if a < 0x7F800000 else i32(0))
    return largest


@kernel
def _quantize_bf16(x_u16: NDArray, factor: np.float32, q_u8: NDArray) -> None:
    for i in range(q_u8.size):
        x = i32(x_u16[i])
        code = _e4m3(bits_f32(i32(x << 16)) * factor)
        code = i32(0x7F) if i32(x & 0x7FFF) >= 0x7F80 else code
        q_u8[i] = i32(code | i32(i32(x >> 8) & 0x80))


@kernel
def _quantize_f32(x_f32: NDArray, factor: np.float32, q_u8: NDArray) -> None:
    for i in range(q_u8.size):
        x = f32_bits(x_f32[i])
        code = _e4m3(x_f32[i] * factor)
        code = i32(0x7F) if i32(x & 0x7FFFFFFF) >= 0x7F800000 else code
        q_u8[i] = i32(code | i32(i32(x >> 24) & 0x80))


@kernel
def _pad_exponents(s_u8: NDArray, tiles: int) -> None:
    for i in range(tiles, s_u8.size):
        s_u8[i] = 0


@kernel
def fp8_pack_row_bf16(x_u16: NDArray, q_u8: NDArray, s_f32: NDArray) -> None:
    """BF16 bit patterns to codes and float32 scales."""
    for tile in range(s_f32.size):
        x = x_u16[tile * TILE : (tile + 1) * TILE]
        factor, s_f32[tile] = _scale_f32(_amax_bf16(x))
        _quantize_bf16(x, factor, q_u8[tile * TILE : (tile + 1) * TILE])


@kernel
def fp8_pack_row_f32(x_f32: NDArray, q_u8: NDArray, s_f32: NDArray) -> None:
    """float32 to codes and float32 scales."""
    for tile in range(s_f32.size):
        x = x_f32[tile * TILE : (tile + 1) * TILE]
        factor, s_f32[tile] = _scale_f32(_amax_f32(x))
        _quantize_f32(x, factor, q_u8[tile * TILE : (tile + 1) * TILE])


@kernel
def fp8_pack_row_bf16_ue8m0(x_u16: NDArray, q_u8: NDArray, s_u8: NDArray) -> None:
    """BF16 bit patterns to codes and power-of-two scales (biased exponents)."""
    tiles = (q_u8.size + TILE - 1) // TILE
    for tile in range(tiles):
        x = x_u16[tile * TILE : (tile + 1) * TILE]
        factor, s_u8[tile] = _scale_ue8m0(_amax_bf16(x))
        _quantize_bf16(x, factor, q_u8[tile * TILE : (tile + 1) * TILE])
    _pad_exponents(s_u8, tiles)


@kernel
def fp8_pack_row_f32_ue8m0(x_f32: NDArray, q_u8: NDArray, s_u8: NDArray) -> None:
    """float32 to codes and power-of-two scales (biased exponents)."""
    tiles = (q_u8.size + TILE - 1) // TILE
    for tile in range(tiles):
        x = x_f32[tile * TILE : (tile + 1) * TILE]
        factor, s_u8[tile] = _scale_ue8m0(_amax_f32(x))
        _quantize_f32(x, factor, q_u8[tile * TILE : (tile + 1) * TILE])
    _pad_exponents(s_u8, tiles)


@kernel
def _dequantize(q_u8: NDArray, scale: np.float32, out_f32: NDArray) -> None:
    for i in range(out_f32.size):
        q = i32(q_u8[i])
        a = i32(q & 0x7F)
        # Subnormal codes count steps; the others only need their exponent rebiased (7 to 127).
        tiny = np.float32(a) * _SUBNORMAL_STEP
        normal = bits_f32(i32(i32(a << 20) + i32(120 << 23)))
        y = f32_bits((tiny if a < 8 else normal) * scale)
        is_nan = (i32(y & 0x7FFFFFFF) > 0x7F800000) | (a == 0x7F)
        y = i32(0x7FC00000) if is_nan else y
        out_f32[i] = bits_f32(i32(y ^ i32(i32(q & 0x80) << 24)))


@kernel
def fp8_unpack_row(q_u8: NDArray, s_f32: NDArray, out_f32: NDArray) -> None:
    """Codes and float32 scales to float32."""
    for tile in range(s_f32.size):
        _dequantize(
            q_u8[tile * TILE : (tile + 1) * TILE],
            s_f32[tile],
            out_f32[tile * TILE : (tile + 1) * TILE],
        )


@kernel
def fp8_unpack_row_ue8m0(q_u8: NDArray, s_u8: NDArray, out_f32: NDArray) -> None:
    """Codes and power-of-two scales (biased exponents) to float32."""
    for tile in range((q_u8.size + TILE - 1) // TILE):
        exponent = i32(s_u8[tile])
        bits = i32(exponent << 23)
        bits = i32(0x00400000) if exponent == 0 else bits
        bits = i32(0x7FC00000) if exponent == 255 else bits
        _dequantize(
            q_u8[tile * TILE : (tile + 1) * TILE],
            bits_f32(bits),
            out_f32[tile * TILE : (tile + 1) * TILE],
        )
