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

from .constants import (
    EXP2_POLYNOMIAL,
    F32_NAN_BITS,
    FP8_AMAX_FLOOR,
    FP8_MAX,
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
    logfmt_code_bytes,
    logfmt_tile_bytes,
    tiles_of,
)

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
    a = np.minimum(np.abs(y.astype(np.float64)), np.float64(FP8_MAX))
    below = np.searchsorted(magnitudes, a, side="right") - 1
    above = (below + 1).clip(max=126)
    # Doubles hold both distances exactly where they can tie.
    down, up = a - magnitudes[below], magnitudes[above] - a
    take_above = (up < down) | ((up == down) & (below % 2 == 1))
    code = np.where(take_above, above, below)
    return (code | np.signbit(y) * 0x80).astype(np.uint8)


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


# -------------------------------------------------------------------------------------- LogFMT


def _horner(coefficients: tuple[np.float32, ...], x: F32) -> F32:
    """Evaluate a polynomial, highest power first, product and sum rounded separately."""
    y = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y = y * x + c
    return y


def log2_magnitude(bits: NDArray[np.uint32]) -> F32:
    """log2 of the float32 magnitudes with these bit patterns (sign clear, finite).

    Zero gives -276, below the logarithm of every other number.
    """
    subnormal = bits < 0x00800000
    # A subnormal is its bit pattern times 2^-149, and that integer is an exact float32.
    normal = np.where(subnormal, _bits(bits.astype(np.float32)), bits).astype(np.int32)
    e = (normal - np.int32(LOG2_SPLIT_BITS)) >> np.int32(23)
    f = _f32((normal - (e << np.int32(23))).view(np.uint32)) - np.float32(1)
    exponent = (e - subnormal * np.int32(149)).astype(np.float32)
    return exponent + _horner(LOG2_POLYNOMIAL, f) * f


def exp2_normal(x: F32) -> F32:
    """2^x for x in [-125, 127]."""
    shifted = x + ROUND_MAGIC
    whole = _bits(shifted) - np.uint32(ROUND_MAGIC_BITS)
    p = _horner(EXP2_POLYNOMIAL, x - (shifted - ROUND_MAGIC))
    return _f32(_bits(p) + (whole << np.uint32(23)))


def _bf16_down(x: np.float32) -> np.float32:
    """Round towards minus infinity to a BF16 value."""
    bits = _bits(np.array([x]))
    away = np.where(np.signbit(x), bits + np.uint32(0xFFFF), bits)
    return _f32(away & np.uint32(0xFFFF0000))[0]


def _bf16_up(x: np.float32) -> np.float32:
    return -_bf16_down(-x)


def _logfmt_step(lo: np.float32, hi: np.float32, bits: int) -> np.float32:
    return (hi - lo) / np.float32(2 ** (bits - 1) - 2)


def _logfmt_encode_tile(x: F32, bits: int) -> tuple[NDArray[np.uint32], np.float32, np.float32]:
    """Codes (sign included) of one tile, and its (min, max) metadata."""
    magnitude = _bits(x) & _MAGNITUDE
    if (magnitude >= _INF).any():
        nan = np.float32(np.nan)
        return np.zeros(len(x), np.uint32), nan, nan
    sign = (_bits(x) >> np.uint32(31)) << np.uint32(bits - 1)
    nonzero = magnitude[magnitude > 0]
    if not len(nonzero):
        return sign, np.float32(0), np.float32(0)
    lo, hi = log2_magnitude(np.array([nonzero.min(), nonzero.max()]))
    hi = _bf16_up(hi)
    lo = max(_bf16_down(lo), _bf16_up(hi - LOGFMT_RANGE_LOG2))

    levels = 2 ** (bits - 1) - 1
    inverse = np.float32(levels - 1) / (hi - lo) if hi > lo else np.float32(0)
    step = _logfmt_step(lo, hi, bits)
    a, b = LINEAR_ROUNDING
    constant = a - b * step
    log2 = log2_magnitude(magnitude)
    code = (log2 - lo) * inverse + constant
    code = np.floor(np.clip(code, np.float32(1), np.float32(levels))).astype(np.uint32)
    code[log2 < lo - np.float32(1)] = 0
    return sign | code, lo, hi


def logfmt_encode(x_TH: F32, bits: int) -> U8:
    """Quantise rows to LogFMT with ``bits`` bits an element, in tiles of 1 x 128.

    The format of section 3.2 of "Insights into DeepSeek-V3" (arXiv:2505.09343). With ``lo`` and
    ``hi`` the smallest and largest log2 of the nonzero magnitudes of a tile and
    ``step = (hi - lo) / (2^(bits-1) - 2)``, magnitude code 0 is zero and code K is
    ``2^(lo + step * (K - 1))``; the sign is the highest bit (zeros keep theirs). The paper
    writes natural logarithms; base 2 is the same format with another unit of ``step``.

    ``lo`` and ``hi`` are rounded outward to BF16 (so nothing clips) and then ``lo`` is raised to
    ``hi - 32`` at least. Below ``2^lo``, magnitudes round to ``2^lo`` or, under half of it, to
    zero.

    Rounding is to the nearest level in linear space: K is the largest code whose midpoint with
    the level below, ``2^(lo + step * (K - 2)) * (1 + 2^step) / 2``, does not exceed the
    magnitude, hence ``K = floor((log2|x| - lo) / step + 2 - log2((1 + 2^step) / 2) / step)``. The
    constant is ``3/2 - step * ln(2)/8``, the start of a series that neither cancels nor divides by
    a small step; the next term, ``step^3 * ln(2)^3/192``, is below 3e-5 of a code (step is at
    most 32/126).

    A tile with a NaN or an infinity has NaN metadata and zero codes, and decodes to NaN.

    Args:
        x_TH: float32 ``[T, H]``.
        bits: 3 to 16; the wire uses 8 and 10.

    Returns:
        uint8 ``[T, logfmt_row_bytes(H, bits)]``. A row is the codes of all tiles, then the
        metadata of all tiles. Codes of a tile are a little-endian bit stream (element i in bits
        ``[bits * i, bits * (i + 1))``) that ends on a byte; metadata are ``lo`` and ``hi`` as
        little-endian BF16.
    """
    T, H = x_TH.shape
    rows = []
    for t in range(T):
        codes, metadata = [], []
        for start in range(0, H, TILE):
            code, lo, hi = _logfmt_encode_tile(x_TH[t, start : start + TILE], bits)
            stream = (code[:, None] >> np.arange(bits, dtype=np.uint32)) & np.uint32(1)
            codes.append(np.packbits(stream.astype(np.uint8).ravel(), bitorder="little"))
            metadata.append(f32_to_bf16(np.array([lo, hi])).astype("<u2").view(np.uint8))
        rows.append(np.concatenate(codes + metadata))
    return np.array(rows, np.uint8).reshape(T, logfmt_row_bytes(H, bits))


def logfmt_row_bytes(hidden: int, bits: int) -> int:
    """Count the bytes of an encoded row: codes of all tiles, then 4 bytes a tile."""
    return logfmt_code_bytes(hidden, bits) + 4 * tiles_of(hidden)


def _logfmt_decode_tile(code: NDArray[np.uint32], lo: np.float32, hi: np.float32, bits: int) -> F32:
    if np.isnan(lo) or np.isnan(hi):
        return np.full(len(code), np.nan, np.float32)
    step = _logfmt_step(lo, hi, bits)
    # 2^log2 = 2^(log2 - whole) * 2^whole: the first factor is normal whatever the tile, so
    # only the last product rounds to a subnormal or overflows.
    whole = np.clip(lo, LOGFMT_EXPONENT_MIN, LOGFMT_EXPONENT_MAX)
    whole = (whole + ROUND_MAGIC) - ROUND_MAGIC
    sign = (code >> np.uint32(bits - 1)) << np.uint32(31)
    k = code & np.uint32(2 ** (bits - 1) - 1)
    log2 = (k.astype(np.int32) - 1).astype(np.float32) * step + (lo - whole)
    with np.errstate(over="ignore"):
        y = exp2_normal(log2) * np.float32(2.0**whole)
    y = np.where(y > LOGFMT_LARGEST, LOGFMT_LARGEST, y)
    return _f32(np.where(k == 0, np.uint32(0), _bits(y)) | sign)


def logfmt_decode(data: U8, hidden: int, bits: int) -> F32:
    """Decode what :func:`logfmt_encode` made to float32 ``[T, hidden]``.

    Finite input decodes to finite output, also after rounding to BF16: values saturate at the
    largest finite BF16.
    """
    T, metadata_start = len(data), logfmt_code_bytes(hidden, bits)
    out = np.zeros((T, hidden), np.float32)
    weights = np.uint32(1) << np.arange(bits, dtype=np.uint32)
    for t in range(T):
        metadata = np.ascontiguousarray(data[t, metadata_start:]).view("<u2")
        bounds = bf16_to_f32(metadata).reshape(-1, 2)
        for tile, start in enumerate(range(0, hidden, TILE)):
            length = min(TILE, hidden - start)
            at = tile * logfmt_tile_bytes(TILE, bits)
            packed = data[t, at : at + logfmt_tile_bytes(length, bits)]
            stream = np.unpackbits(packed, bitorder="little")[: bits * length]
            code = (stream.reshape(length, bits) * weights).sum(1).astype(np.uint32)
            lo, hi = bounds[tile]
            out[t, start : start + length] = _logfmt_decode_tile(code, lo, hi, bits)
    return out
