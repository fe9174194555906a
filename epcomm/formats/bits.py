"""What the row kernels are written in: compile options, bit casts, 32-bit integers.

Numba widens every integer operation to 64 bits; naming the 32-bit result (``i32(a + b)``) lets
LLVM narrow it again, which doubles the lanes of a vector. An index named unsigned (``uint(a + b)``)
is not tested for being negative.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

i32 = np.int32
uint = np.uintp

# No fastmath: contraction or reassociation would change the bytes.
kernel: Any = njit(cache=True, nogil=True, error_model="numpy")


def _bitcast(source: Any, result: Any, llvm_type: ir.Type) -> Callable[[Any], Any]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], llvm_type)

    def typing(typing_context: Any, x: Any) -> Any:
        return result(source), codegen

    return cast(Callable[[Any], Any], intrinsic(typing))


f32_bits = _bitcast(types.float32, types.int32, ir.IntType(32))
"""The bit pattern of a float32 as int32."""

bits_f32 = _bitcast(types.int32, types.float32, ir.FloatType())
"""The float32 with the bit pattern of an int32."""
