"""What the row kernels are written in: compile options, bit casts, 32-bit integers.

Numba widens every integer operation to 64 bits; naming the 32-bit result (``i32(a + b)``) lets
LLVM narrow it again, which doubles the lanes of a vector. An index named unsigned (``uint(a + b)``)
is not tested for being negative.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

from ..native import constants, numbers

i32 = np.int32
uint = np.uintp


def _hash_sources() -> str:
    """Of the kernels, and of what they take from the library when they are compiled."""
    digest = hashlib.sha256(repr((constants, numbers)).encode())
    package = Path(__file__).parents[1]
    for folder in ("formats", "cpu"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


_SOURCES = _hash_sources()


class _KernelCache(FunctionCache):
    """Numba's cache on disk, made to notice a change in what a kernel calls.

    Numba looks at the file a function stands in; a kernel inlines functions of other files.
    """

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = (self._cache_file._source_stamp, _SOURCES)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function on first use, keep the result on disk, run it without the GIL.

    No fastmath: contraction or reassociation would change the bytes.
    """
    dispatcher: Any = njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = _KernelCache(function)
    return dispatcher


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
