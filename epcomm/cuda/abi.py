"""The CUDA part of libepcomm: its structures and its functions.

Layouts and enumerators are read from the library (``epcomm_cuda_fields``).
"""

import ctypes

import numpy as np

from .. import native

#: Whether this build of the library has the CUDA kernels.
available: bool = hasattr(native.library, "epcomm_cuda_load")


def _describe() -> None:
    """Fill ``dtypes`` and ``structures``. The last field of a structure is its size."""
    nested = {
        "announcement": native.make_structure(
            "announcement",
            native.fields["announcement"],
            native.constants["sizeof_announcement"],
            {},
        )
    }
    for structure, (*fields, end) in native.read_fields("epcomm_cuda_fields").items():
        name = structure.removeprefix("cuda_")
        assert end.field == b"", f"{name} has no end"
        dtypes[name] = native.make_dtype(fields, end.offset)
        structures[name] = native.make_structure(name, fields, end.offset, nested)
        nested[name] = structures[name]


def _declare() -> None:
    library = native.library
    library.epcomm_cuda_window_parts.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    library.epcomm_cuda_window_parts.restype = None
    library.epcomm_cuda_control_bytes.argtypes = [ctypes.c_int32] * 3
    library.epcomm_cuda_control_bytes.restype = ctypes.c_int64
    library.epcomm_cuda_refused_offset.argtypes = [ctypes.c_int32] * 4
    library.epcomm_cuda_refused_offset.restype = ctypes.c_int64
    library.epcomm_cuda_announcement_offset.argtypes = [
        *[ctypes.c_int32] * 4,
        ctypes.c_uint64,
    ]
    library.epcomm_cuda_announcement_offset.restype = ctypes.c_int64
    kernels = ("dispatch", "combine", "two_hop_layout", "two_hop_dispatch", "two_hop_combine")
    for name in kernels:
        getattr(library, f"epcomm_cuda_launch_{name}").argtypes = [ctypes.c_void_p] * 3
    library.epcomm_cuda_sequence_open.argtypes = [ctypes.c_void_p]
    library.epcomm_cuda_sequence_close.argtypes = [ctypes.c_void_p]
    library.epcomm_cuda_sequence_close.restype = None
    library.epcomm_cuda_enter.argtypes = [ctypes.c_void_p] * 3
    library.epcomm_cuda_copy.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_void_p,
    ]
    library.epcomm_cuda_launch_calibrate.argtypes = [ctypes.c_void_p] * 2
    library.epcomm_cuda_order.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.epcomm_cuda_event_open.argtypes = [ctypes.c_void_p]
    library.epcomm_cuda_event_close.argtypes = [ctypes.c_void_p]
    library.epcomm_cuda_event_record.argtypes = [ctypes.c_void_p] * 2
    library.epcomm_cuda_event_wait.argtypes = [ctypes.c_void_p] * 2
    library.epcomm_cuda_event_query.argtypes = [ctypes.c_void_p]
    library.epcomm_cuda_loan_open.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    library.epcomm_cuda_loan_open.restype = ctypes.c_void_p
    library.epcomm_cuda_loan_lend.restype = None  # takes a reference as it is
    library.epcomm_cuda_loan_close.argtypes = [ctypes.c_void_p]
    library.epcomm_cuda_loan_close.restype = None
    library.epcomm_cuda_compare_clocks.argtypes = [ctypes.c_void_p] * 3
    library.epcomm_cuda_versions.argtypes = [ctypes.POINTER(ctypes.c_int32)] * 2
    library.epcomm_cuda_error_text.argtypes = [ctypes.c_int]
    library.epcomm_cuda_error_text.restype = ctypes.c_char_p
    library.epcomm_cuda_wait_prepared.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_int64,
    ]


#: Enumerators (verdicts) and limits by name; empty without CUDA.
constants: dict[str, int] = {}
#: NumPy dtypes by structure name without ``epcomm_cuda_``; empty without CUDA.
dtypes: dict[str, np.dtype] = {}
#: ctypes structures, likewise: parameter blocks are filled in through these.
structures: dict[str, type[ctypes.Structure]] = {}
if available:
    constants = native.read_constants("epcomm_cuda_constants")
    _describe()
    _declare()


def versions() -> tuple[int, int]:
    """CUDA versions of the driver (0: none) and of the library's runtime, as 12040 for 12.4."""
    driver, runtime = ctypes.c_int32(), ctypes.c_int32()
    native.library.epcomm_cuda_versions(ctypes.byref(driver), ctypes.byref(runtime))
    return driver.value, runtime.value


def check(code: int, what: str) -> None:
    """Raise RuntimeError if a library call returned a CUDA error."""
    if code != 0:
        text = native.library.epcomm_cuda_error_text(code).decode()
        raise RuntimeError(f"{what} failed: {text} (CUDA error {code})")
