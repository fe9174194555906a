"""Rows of BF16 (as uint16 bit patterns) to float32 and back.

All arguments are contiguous 1-D arrays of equal length.
"""

from numpy.typing import NDArray

from .bits import bits_f32, f32_bits, i32, kernel


@kernel
def bf16_to_f32_row(x_u16: NDArray, out_f32: NDArray) -> None:
    """Widen a row; exact."""
    for i in range(out_f32.size):
        out_f32[i] = bits_f32(i32(i32(x_u16[i]) << 16))


@kernel
def add_bf16_row(x_u16: NDArray, acc_f32: NDArray) -> None:
    """Add a BF16 row to a float32 accumulator."""
    for i in range(acc_f32.size):
        acc_f32[i] += bits_f32(i32(i32(x_u16[i]) << 16))


@kernel
def f32_to_bf16_row(x_f32: NDArray, out_u16: NDArray) -> None:
    """Round a row to nearest even; every NaN becomes 0x7FC0 with its sign."""
    for i in range(out_u16.size):
        bits = f32_bits(x_f32[i])
        rounded = i32(i32(bits + i32(0x7FFF + i32(i32(bits >> 16) & 1))) >> 16)
        nan = i32(i32(i32(bits >> 16) & 0x8000) | 0x7FC0)
        out_u16[i] = nan if i32(bits & 0x7FFFFFFF) > 0x7F800000 else rounded
