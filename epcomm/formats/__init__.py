"""Wire formats, torch in and torch out: FP8 E4M3 with tile scales, and LogFMT.

The meaning of each format is in :mod:`.reference`, the codecs of single rows in :mod:`.kernels`,
the sizes in :mod:`.wire`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from . import batch
from .constants import tiles_of
from .wire import WireFormat

__all__ = [
    "WireFormat",
    "dequantize_fp8",
    "logfmt_decode",
    "logfmt_encode",
    "logfmt_row_bytes",
    "quantize_fp8",
]

_FLOATS = (torch.bfloat16, torch.float32)
_LOGFMT = {8: WireFormat.LOGFMT8, 10: WireFormat.LOGFMT10}


def _check(name: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {expected}, got {x.dtype}")
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got {x.device}")
    if x.ndim != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {tuple(x.shape)}")
    if x.shape[1] < 1:
        raise ValueError(f"{name} must have at least one column, got shape {tuple(x.shape)}")
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")


def _check_shape(name: str, x: torch.Tensor, expected: tuple[int, int]) -> None:
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")


def _check_output(dtype: torch.dtype) -> None:
    if dtype not in _FLOATS:
        raise TypeError(f"dtype must be torch.bfloat16 or torch.float32, got {dtype}")


def _wire_of(bits: int) -> WireFormat:
    if bits not in _LOGFMT:
        raise ValueError(f"bits must be 8 or 10, got {bits!r}")
    return _LOGFMT[bits]


def _array(x: torch.Tensor) -> NDArray:
    """View a tensor as NumPy; BF16 as uint16 and FP8 as uint8 bit patterns."""
    x = x.detach()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16)
    if x.dtype == torch.float8_e4m3fn:
        return x.view(torch.uint8).numpy()
    return x.numpy()


def quantize_fp8(
    x: torch.Tensor, scale_format: Literal["f32", "ue8m0"] = "f32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows to FP8 E4M3 with one scale per tile of 128 columns.

    ``scale = max(amax, 1e-4) / 448`` over the finite elements of a tile; ``"ue8m0"`` rounds it up
    to a power of two. NaN and infinities become NaN and leave their neighbours alone.

    Args:
        x: bfloat16 or float32 ``[T, H]``, contiguous, on the CPU.
        scale_format: ``"f32"`` or ``"ue8m0"``.

    Returns:
        float8_e4m3fn ``[T, H]``, and the scales: float32 ``[T, ceil(H / 128)]``, or for
        ``"ue8m0"`` int32 ``[T, ceil(H / 512)]``, four biased exponents each, lowest byte first,
        unused bytes 0.

    Raises:
        TypeError: ``x`` is no tensor or of another dtype.
        ValueError: ``x`` has another rank, layout or device, or ``scale_format`` is unknown.
    """
    _check("x", x, _FLOATS)
    if scale_format not in ("f32", "ue8m0"):
        raise ValueError(f'scale_format must be "f32" or "ue8m0", got {scale_format!r}')
    T, H = x.shape
    q = torch.empty(T, H, dtype=torch.float8_e4m3fn)
    if scale_format == "f32":
        scales = torch.empty(T, tiles_of(H), dtype=torch.float32)
        pack = batch.fp8_pack_bf16 if x.dtype == torch.bfloat16 else batch.fp8_pack_f32
        pack(_array(x), _array(q), _array(scales))
    else:
        scales = torch.empty(T, -(-tiles_of(H) // 4), dtype=torch.int32)
        pack = batch.fp8_pack_bf16_ue8m0 if x.dtype == torch.bfloat16 else batch.fp8_pack_f32_ue8m0
        pack(_array(x), _array(q), _array(scales).view(np.uint8))
    return q, scales


def dequantize_fp8(
    q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Undo :func:`quantize_fp8`: code times scale in float32, rounded once if ``dtype`` is BF16.

    Args:
        q: float8_e4m3fn ``[T, H]``.
        scales: float32 ``[T, ceil(H / 128)]``, or int32 ``[T, ceil(H / 512)]`` (UE8M0).
        dtype: ``torch.bfloat16`` or ``torch.float32``.

    Returns:
        ``dtype`` ``[T, H]``.

    Raises:
        TypeError: a tensor or ``dtype`` of another type.
        ValueError: a tensor of another shape, layout or device.
    """
    _check("q", q, (torch.float8_e4m3fn,))
    _check("scales", scales, (torch.float32, torch.int32))
    _check_output(dtype)
    T, H = q.shape
    out = torch.empty(T, H, dtype=dtype)
    is_bf16 = dtype == torch.bfloat16
    if scales.dtype == torch.float32:
        _check_shape("scales", scales, (T, tiles_of(H)))
        unpack = batch.fp8_unpack_bf16 if is_bf16 else batch.fp8_unpack_f32
        unpack(_array(q), _array(scales), _array(out))
    else:
        _check_shape("scales", scales, (T, -(-tiles_of(H) // 4)))
        unpack = batch.fp8_unpack_bf16_ue8m0 if is_bf16 else batch.fp8_unpack_f32_ue8m0
        unpack(_array(q), _array(scales).view(np.uint8), _array(out))
    return out


def logfmt_row_bytes(hidden: int, bits: int) -> int:
    """Count the bytes of a LogFMT row: the codes of all tiles, then 4 bytes a tile.

    Raises:
        ValueError: ``bits`` is neither 8 nor 10, or ``hidden`` is below 1.
    """
    wire = _wire_of(bits)
    return wire.payload_bytes(hidden) + wire.scale_bytes(hidden)


def logfmt_encode(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantise rows to LogFMT-8 or LogFMT-10 in tiles of 128 columns.

    A tile with a NaN or an infinity becomes NaN as a whole. See
    :func:`epcomm.formats.reference.logfmt_encode` for the format.

    Args:
        x: bfloat16 or float32 ``[T, H]``, contiguous, on the CPU.
        bits: 8 or 10.

    Returns:
        uint8 ``[T, logfmt_row_bytes(H, bits)]``.

    Raises:
        TypeError: ``x`` is no tensor or of another dtype.
        ValueError: ``x`` has another rank, layout or device, or ``bits`` is neither 8 nor 10.
    """
    _check("x", x, _FLOATS)
    T, H = x.shape
    data = torch.empty(T, logfmt_row_bytes(H, bits), dtype=torch.uint8)
    pack = batch.logfmt_pack_bf16 if x.dtype == torch.bfloat16 else batch.logfmt_pack_f32
    pack(_array(x), bits, _array(data))
    return data


def logfmt_decode(
    data: torch.Tensor, hidden: int, bits: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Undo :func:`logfmt_encode`.

    Args:
        data: uint8 ``[T, logfmt_row_bytes(hidden, bits)]``.
        hidden: elements of a row.
        bits: 8 or 10.
        dtype: ``torch.bfloat16`` or ``torch.float32``.

    Returns:
        ``dtype`` ``[T, hidden]``; finite wherever the input was.

    Raises:
        TypeError: ``data`` or ``dtype`` of another type.
        ValueError: ``data`` of another shape, layout or device, or ``bits`` neither 8 nor 10.
    """
    _check("data", data, (torch.uint8,))
    _check_output(dtype)
    _check_shape("data", data, (len(data), logfmt_row_bytes(hidden, bits)))
    out = torch.empty(len(data), hidden, dtype=dtype)
    unpack = batch.logfmt_unpack_bf16 if dtype == torch.bfloat16 else batch.logfmt_unpack_f32
    unpack(_array(data), bits, _array(out))
    return out
