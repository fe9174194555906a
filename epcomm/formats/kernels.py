"""The row codecs of every wire format, gathered for the code that calls them.

They are Numba functions over contiguous 1-D arrays (views made with ``numba.carray`` included),
hold no lock, allocate at most a few small buffers and match :mod:`.reference` byte for byte.
"""

from .bf16_kernels import add_bf16_row, bf16_to_f32_row, f32_to_bf16_row
from .fp8_kernels import (
    fp8_pack_row_bf16,
    fp8_pack_row_bf16_ue8m0,
    fp8_pack_row_f32,
    fp8_pack_row_f32_ue8m0,
    fp8_unpack_row,
    fp8_unpack_row_ue8m0,
)
from .logfmt_kernels import logfmt_pack_row, logfmt_unpack_row

__all__ = [
    "add_bf16_row",
    "bf16_to_f32_row",
    "f32_to_bf16_row",
    "fp8_pack_row_bf16",
    "fp8_pack_row_bf16_ue8m0",
    "fp8_pack_row_f32",
    "fp8_pack_row_f32_ue8m0",
    "fp8_unpack_row",
    "fp8_unpack_row_ue8m0",
    "logfmt_pack_row",
    "logfmt_unpack_row",
]
