"""What each wire format means, in NumPy.

Slow and obvious. Every other implementation (Numba, CUDA) must give the same bytes, so each
step is one IEEE float32 operation, rounded to nearest even, in the order written here: no fused
multiply-add, no float64 intermediate, no log or exp of a mathematics library (their last bits
differ). Subnormals are numbers like any other; nothing is flushed to zero.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .constants import F32_NAN_BITS, FP8_AMAX_FLOOR, FP8_MAX, TILE, tiles_of

ScaleFormat = Literal["f32", "ue8m0"]
F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INF = np.uint32(0x7F800000)


def _bits(x: F32) -> NDArray[np.uint32]:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def _f32(bits: NDArray[np.uint32]) -> F32:
    return np.ascontiguousarray(bits, np.uint32).view(np.float32)


# ---------------------------------------------------------------------------------------- BF16


def bf16_to_f32(u16: U16) -> F32:
    """BF16 bit patterns as float32; exact, NaN payloads kept."""
    return _f32(u16.astype(np.uint32) << np.uint32(16))


def f32_to_bf16(x: F32) -> U16:
    """float32 to BF16 bit patterns, to nearest even; every NaN becomes 0x7FC0 with its sign."""
    bits = _bits(x)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits.astype(np.uint64) + 0x7FFF + odd) >> 16
    nan = 0x7FC0 | ((bits >> np.uint32(16)) & np.uint32(0x8000))
    return np.where((bits & _MAGNITUDE) > _INF, nan, rounded).astype(np.uint16)


# ----------------------------------------------------------------------------------- FP8 E4M3


def e4m3_values() -> F32:
    """Return the 256 values of E4M3 "fn": bias 7, no infinity, 0x7F and 0xFF are NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(float) - 10)
    )
    value[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code & 0x80, -value, value).astype(np.float32)


def f32_to_e4m3(y: F32) -> U8:
    """Finite float32 to the nearest E4M3 code, ties to the even code, saturating at +-448."""
    magnitudes = e4m3_values()[:127].astype(np.float64)
    a = np.minimum(np.abs(y.astype(np.float64)), 448.0)
    below = np.searchsorted(magnitudes, a, side="right") - 1
    above = np.minimum(below + 1, 126)
    # Doubles hold both distances exactly where they can tie.
    down, up = a - magnitudes[below], magnitudes[above] - a
    take_above = (up < down) | ((up == down) & (below % 2 == 1))
    code = np.where(take_above, above, below)
    return (code | np.where(np.signbit(y), 0x80, 0)).astype(np.uint8)


def fp8_encode(x_TH: F32, scale_format: ScaleFormat) -> tuple[U8, NDArray]:
    """Quantise rows to E4M3 with one scale per tile of 1 x 128.

    With ``amax`` the largest finite magnitude of the tile, at least 1e-4:

    - ``"f32"``: ``scale = amax / 448``, ``q = e4m3(x * (448 / amax))``.
    - ``"ue8m0"``: ``scale = 2^e``, the smallest power of two not below the float32 quotient
      ``amax / 448``, ``q = e4m3(x * 2^-e)``.

    A NaN or an infinity becomes the NaN code with its sign and does not influence its
    neighbours. float32 subnormals lie far below the smallest code whatever the scale (amax is
    at least 1e-4), so they become zeros of their sign.

    Args:
        x_TH: float32 ``[T, H]``.
        scale_format: ``"f32"`` or ``"ue8m0"``.

    Returns:
        Codes uint8 ``[T, H]``, and scales: float32 ``[T, tiles]``, or int32
        ``[T, ceil(tiles / 4)]``, four biased exponents each, the first in the lowest byte,
        unused bytes 0.
    """
    T, H = x_TH.shape
    codes = np.zeros((T, H), np.uint8)
    scales = np.zeros((T, tiles_of(H)), np.float32)
    exponents = np.zeros((T, 4 * -(-tiles_of(H) // 4)), np.uint8)
    for t in range(T):
        for tile in range(tiles_of(H)):
            x = x_TH[t, tile * TILE : (tile + 1) * TILE]
            finite = np.isfinite(x)
            amax = np.max(np.abs(x[finite]), initial=FP8_AMAX_FLOOR)
            scale = amax / FP8_MAX
            if scale_format == "f32":
                scales[t, tile] = scale
                factor = FP8_MAX / amax
            else:
                bits = _bits(scale).item()
                exponent = (bits >> 23) + (1 if bits & 0x7FFFFF else 0)
                exponents[t, tile] = exponent
                factor = np.float32(2.0 ** (127 - exponent))
            q = f32_to_e4m3(np.where(finite, x, np.float32(0)) * factor)
            nan = 0x7F | (np.signbit(x) * 0x80)
            codes[t, tile * TILE : (tile + 1) * TILE] = np.where(finite, q, nan)
    if scale_format == "f32":
        return codes, scales
    return codes, exponents.view("<i4").astype(np.int32)


def ue8m0_values() -> F32:
    """Return the 256 values of UE8M0: ``2^(e - 127)``, and NaN for 255."""
    value = 2.0 ** (np.arange(256.0) - 127)
    value[255] = np.nan
    return value.astype(np.float32)


def fp8_decode(codes_TH: U8, scales: NDArray, scale_format: ScaleFormat) -> F32:
    """``value(code) * scale`` in float32; every NaN becomes 0x7FC00000 with the code's sign.

    A UE8M0 tile whose largest magnitude is 1.9375 * 2^127 or more decodes it to infinity:
    the format rounds it up to 2^128.

    Args:
        codes_TH: uint8 ``[T, H]``.
        scales: as returned by :func:`fp8_encode`.
        scale_format: ``"f32"`` or ``"ue8m0"``.
    """
    H = codes_TH.shape[1]
    if scale_format == "ue8m0":
        exponents = np.ascontiguousarray(scales).astype("<i4").view(np.uint8)
        scales = ue8m0_values()[exponents[:, : tiles_of(H)]]
    scale_TH = np.repeat(scales, TILE, axis=1)[:, :H]
    with np.errstate(over="ignore", invalid="ignore"):
        y = e4m3_values()[codes_TH] * scale_TH
    nan = F32_NAN_BITS | ((codes_TH.astype(np.uint32) & np.uint32(0x80)) << np.uint32(24))
    return _f32(np.where(np.isnan(y), nan, _bits(y)))
