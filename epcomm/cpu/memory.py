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

#: A call that writes more than this does not find it in a cache afterwards, bytes.
STREAM_BYTES = 8 << 20


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


@_intrinsic
def _stream_unit(typingctx: Any, to: Any, source: Any) -> Any:
    """Copy 16 aligned bytes past the caches."""
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        unit = ir.VectorType(ir.IntType(32), 4).as_pointer()
        value = builder.load(builder.inttoptr(args[1], unit))
        value.align = 1
        store = builder.store(value, builder.inttoptr(args[0], unit), align=16)
        one = ir.Constant(ir.IntType(32), 1)
        store.set_metadata("nontemporal", builder.module.add_metadata([one]))
        return cgutils.get_null_value(ir.IntType(32))

    return types.int32(types.int64, types.int64), codegen


@_intrinsic
def fence(typingctx: Any) -> Any:
    """Order streamed rows before whatever tells somebody that they are there.

    Streaming stores wait in buffers that ordinary stores, such as a transport's flag, may pass.
    """
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature, args
        builder.fence("seq_cst")
        return cgutils.get_null_value(ir.IntType(32))

    return types.int32(), codegen


@kernel
def copy_row(to: int, source: int, count: int, stream: bool) -> None:
    """Copy a row, a whole number of 16-byte units, to a 16-byte boundary.

    ``stream`` keeps the destination out of the caches: right when a call writes more than they
    hold, since a line that is only written is then not read from memory first.
    """
    if stream:
        for at in range(0, count, 16):
            _stream_unit(to + at, source + at)
    else:
        copy_bytes(to, source, count)


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
