"""The CUDA part of libepcomm: its structures as NumPy dtypes, and its functions.

Layouts and enumerators are read from the library (``epcomm_cuda_fields``); the nested structures
of a parameter block are views of its bytes.
"""

import ctypes
from typing import Any

import numpy as np

from .. import native

#: Whether this build of the library has the CUDA kernels.
available: bool = hasattr(native.library, "epcomm_cuda_load")


def _read_constants() -> dict[str, int]:
    count = ctypes.c_uint32()
    native.library.epcomm_cuda_constants.restype = ctypes.POINTER(native._Constant)
    table = native.library.epcomm_cuda_constants(ctypes.byref(count))
    return {table[i].name.decode(): table[i].value for i in range(count.value)}


def _read_dtypes() -> dict[str, np.dtype]:
    count = ctypes.c_uint32()
    native.library.epcomm_cuda_fields.restype = ctypes.POINTER(native._Field)
    table = native.library.epcomm_cuda_fields(ctypes.byref(count))
    descriptions: dict[str, dict[str, Any]] = {}
    for i in range(count.value):
        field = table[i]
        structure = field.structure.decode().removeprefix("cuda_")
        parts = descriptions.setdefault(structure, {"names": [], "formats": [], "offsets": []})
        name = field.field.decode()
        if not name:
            parts["itemsize"] = field.offset
            continue
        scalar = f"{field.kind.decode()}{field.item_bytes}"
        parts["names"].append(name)
        parts["formats"].append(scalar if field.count == 1 else f"({field.count},){scalar}")
        parts["offsets"].append(field.offset)
    return {name: np.dtype(parts) for name, parts in descriptions.items()}  # type: ignore[call-overload]


def _declare() -> None:
    library = native.library
    library.epcomm_cuda_window_parts.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    library.epcomm_cuda_window_parts.restype = None
    library.epcomm_cuda_control_bytes.argtypes = [ctypes.c_int32, ctypes.c_int32]
    library.epcomm_cuda_control_bytes.restype = ctypes.c_int64
    library.epcomm_cuda_announcement_offset.argtypes = [
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_uint64,
    ]
    library.epcomm_cuda_announcement_offset.restype = ctypes.c_int64
    for name in ("layout", "dispatch", "combine"):
        getattr(library, f"epcomm_cuda_launch_{name}").argtypes = [ctypes.c_void_p] * 2
    library.epcomm_cuda_order.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.epcomm_cuda_error_text.argtypes = [ctypes.c_int]
    library.epcomm_cuda_error_text.restype = ctypes.c_char_p
    library.epcomm_cuda_wait_prepared.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_int64,
    ]


#: Enumerators (verdicts) and limits by name; empty without CUDA.
constants: dict[str, int] = {}
#: dtypes by structure name without ``epcomm_cuda_``; empty without CUDA.
dtypes: dict[str, np.dtype] = {}
if available:
    constants = _read_constants()
    dtypes = _read_dtypes()
    _declare()


def part(block: np.ndarray, field: str, dtype: np.dtype) -> np.ndarray:
    """The nested structure ``field`` of a parameter block, as a writable 0-d view."""
    return block[field].view(dtype).reshape(())


def check(code: int, what: str) -> None:
    """Raise RuntimeError if a library call returned a CUDA error."""
    if code != 0:
        text = native.library.epcomm_cuda_error_text(code).decode()
        raise RuntimeError(f"{what} failed: {text} (CUDA error {code})")
