"""The row codecs over all rows of a matrix, with BF16 on the outside where the codec wants float32.

All arrays are contiguous and two-dimensional with the same number of rows.
"""

import numpy as np
from numpy.typing import NDArray

from .bits import kernel
from .kernels import (
    bf16_to_f32_row,
    f32_to_bf16_row,
    fp8_pack_row_bf16,
    fp8_pack_row_bf16_ue8m0,
    fp8_pack_row_f32,
    fp8_pack_row_f32_ue8m0,
    fp8_unpack_row,
    fp8_unpack_row_ue8m0,
    logfmt_pack_row,
    logfmt_unpack_row,
)


@kernel
def bf16_pack(x: NDArray, out: NDArray) -> None:
    for t in range(len(x)):
        f32_to_bf16_row(x[t], out[t])


@kernel
def bf16_unpack(x: NDArray, out: NDArray) -> None:
    for t in range(len(x)):
        bf16_to_f32_row(x[t], out[t])


@kernel
def fp8_pack_bf16(x: NDArray, q: NDArray, scales: NDArray) -> None:
    for t in range(len(x)):
        fp8_pack_row_bf16(x[t], q[t], scales[t])


@kernel
def fp8_pack_bf16_ue8m0(x: NDArray, q: NDArray, scales: NDArray) -> None:
    for t in range(len(x)):
        fp8_pack_row_bf16_ue8m0(x[t], q[t], scales[t])


@kernel
def fp8_pack_f32(x: NDArray, q: NDArray, scales: NDArray) -> None:
    for t in range(len(x)):
        fp8_pack_row_f32(x[t], q[t], scales[t])


@kernel
def fp8_pack_f32_ue8m0(x: NDArray, q: NDArray, scales: NDArray) -> None:
    for t in range(len(x)):
        fp8_pack_row_f32_ue8m0(x[t], q[t], scales[t])


@kernel
def fp8_unpack_f32(q: NDArray, scales: NDArray, out: NDArray) -> None:
    for t in range(len(q)):
        fp8_unpack_row(q[t], scales[t], out[t])


@kernel
def fp8_unpack_f32_ue8m0(q: NDArray, scales: NDArray, out: NDArray) -> None:
    for t in range(len(q)):
        fp8_unpack_row_ue8m0(q[t], scales[t], out[t])


@kernel
def fp8_unpack_bf16(q: NDArray, scales: NDArray, out: NDArray) -> None:
    row = np.empty(out.shape[1], np.float32)
    for t in range(len(q)):
        fp8_unpack_row(q[t], scales[t], row)
        f32_to_bf16_row(row, out[t])


@kernel
def fp8_unpack_bf16_ue8m0(q: NDArray, scales: NDArray, out: NDArray) -> None:
    row = np.empty(out.shape[1], np.float32)
    for t in range(len(q)):
        fp8_unpack_row_ue8m0(q[t], scales[t], row)
        f32_to_bf16_row(row, out[t])


@kernel
def logfmt_pack_f32(x: NDArray, bits: int, data: NDArray) -> None:
    for t in range(len(x)):
        logfmt_pack_row(x[t], bits, data[t])


@kernel
def logfmt_pack_bf16(x: NDArray, bits: int, data: NDArray) -> None:
    row = np.empty(x.shape[1], np.float32)
    for t in range(len(x)):
        bf16_to_f32_row(x[t], row)
        logfmt_pack_row(row, bits, data[t])


@kernel
def logfmt_unpack_f32(data: NDArray, bits: int, out: NDArray) -> None:
    for t in range(len(data)):
        logfmt_unpack_row(data[t], bits, out[t])


@kernel
def logfmt_unpack_bf16(data: NDArray, bits: int, out: NDArray) -> None:
    row = np.empty(out.shape[1], np.float32)
    for t in range(len(data)):
        logfmt_unpack_row(data[t], bits, row)
        f32_to_bf16_row(row, out[t])
