"""Raw addresses inside Numba kernels.

Rows live in other processes' windows, known by address; the kernels see them through arrays made
on the spot (``*_at``) or copy them with memcpy.
"""

from collections.abc import Callable
from typing import Any

import numba as nb
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..formats.bits import kernel

# Typed as what kernels see; numba's decorator hides it.
_intrinsic: Callable[[Any], Any] = intrinsic


@_intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@_intrinsic
def copy_bytes(typingctx: Any, to: Any, source: Any, count: Any) -> Any:
    """memcpy(to, source, count) between addresses (int64)."""
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        to_pointer = builder.inttoptr(args[0], cgutils.voidptr_t)
        source_pointer = builder.inttoptr(args[1], cgutils.voidptr_t)
        cgutils.raw_memcpy(
            builder, to_pointer, source_pointer, args[2], ir.Constant(args[2].type, 1)
        )
        return cgutils.get_null_value(ir.IntType(32))

    return types.int32(types.int64, types.int64, types.int64), codegen


def _view(dtype: Any) -> Callable[..., Any]:
    @kernel
    def view(address: int, count: int) -> Any:
        return nb.carray(_pointer(address), (count,), dtype)

    return view


u8_at = _view(nb.uint8)
u16_at = _view(nb.uint16)
i32_at = _view(nb.int32)
i64_at = _view(nb.int64)
u64_at = _view(nb.uint64)
f32_at = _view(nb.float32)


@kernel
def copy_memory(to: int, source: int, count: int) -> None:
    """Memcpy between addresses, callable from Python."""
    copy_bytes(to, source, count)
