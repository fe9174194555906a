"""libepcomm through ctypes: the protocol's integers and structures, and the counters.

Nothing the C headers define is written again here: names, values, offsets and sizes are read
from the library when this module is imported.
"""

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

_PATH = Path(__file__).parent / "libepcomm.so"


class _Constant(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_int64)]


class _Field(ctypes.Structure):
    _fields_ = [
        ("structure", ctypes.c_char_p),
        ("field", ctypes.c_char_p),
        ("offset", ctypes.c_uint32),
        ("item_bytes", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("kind", ctypes.c_char),
    ]


class Wait(ctypes.Structure):
    """``epcomm_wait``: how long to wait for a counter, and what ends the wait early."""

    _fields_ = [
        ("timeout_ns", ctypes.c_int64),
        ("peer_pid", ctypes.c_int32),
        ("spin", ctypes.c_int32),
        ("abort", ctypes.c_void_p),
    ]


def _load() -> ctypes.CDLL:
    if not _PATH.exists():
        raise ImportError(
            f"{_PATH} is missing; build it with 'pip install -e .' (a C++17 compiler is needed)"
        )
    library = ctypes.CDLL(str(_PATH))
    for name in ("epcomm_payload_bytes", "epcomm_scale_bytes"):
        function = getattr(library, name)
        function.argtypes = [ctypes.c_int32, ctypes.c_int64]
        function.restype = ctypes.c_int64
    for name in ("epcomm_dispatch_record", "epcomm_combine_record"):
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.epcomm_constants.restype = ctypes.POINTER(_Constant)
    library.epcomm_fields.restype = ctypes.POINTER(_Field)
    library.epcomm_counter_add.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    library.epcomm_counter_add.restype = None
    library.epcomm_counter_read.argtypes = [ctypes.c_void_p]
    library.epcomm_counter_read.restype = ctypes.c_uint64
    library.epcomm_counter_wait.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]
    return library


library = _load()


def _read_constants() -> dict[str, int]:
    count = ctypes.c_uint32()
    table = library.epcomm_constants(ctypes.byref(count))
    return {table[i].name.decode(): table[i].value for i in range(count.value)}


def _read_dtypes() -> dict[str, np.dtype]:
    count = ctypes.c_uint32()
    table = library.epcomm_fields(ctypes.byref(count))
    parts: dict[str, list[_Field]] = {}
    for i in range(count.value):
        parts.setdefault(table[i].structure.decode(), []).append(table[i])
    dtypes = {}
    for structure, fields in parts.items():
        formats = []
        for field in fields:
            scalar = f"{field.kind.decode()}{field.item_bytes}"
            formats.append(scalar if field.count == 1 else f"({field.count},){scalar}")
        description: Any = {
            "names": [field.field.decode() for field in fields],
            "formats": formats,
            "offsets": [field.offset for field in fields],
        }
        size = constants.get(f"sizeof_{structure}")
        if size is not None:
            description["itemsize"] = size
        dtypes[structure] = np.dtype(description)
    return dtypes


#: Limits (``limit_*``), enumerators and sizes by name.
constants: dict[str, int] = _read_constants()
#: NumPy structured dtypes of the protocol's structures, by name without the ``epcomm_`` prefix.
dtypes: dict[str, np.dtype] = _read_dtypes()


@dataclass(frozen=True)
class RecordLayout:
    """Byte offsets of a record's parts (``epcomm_record``); ``bytes`` is the record's size."""

    payload: int
    scales: int
    meta: int
    expert: int
    row: int
    weight: int
    bytes: int
    payload_bytes: int
    scale_bytes: int


@lru_cache
def _record(
    function: str, fmt: int, hidden: int, num_topk: int, with_weights: bool
) -> RecordLayout:
    shape = np.zeros((), dtypes["record_shape"])
    shape["format"], shape["hidden"], shape["num_topk"] = fmt, hidden, num_topk
    shape["with_weights"] = with_weights
    record = np.zeros((), dtypes["record"])
    if getattr(library, function)(shape.ctypes.data, record.ctypes.data) != 0:
        raise ValueError(f"no record exists for format {fmt}, hidden {hidden}, top-k {num_topk}")
    return RecordLayout(**{name: int(record[name]) for name in record.dtype.names or ()})


def dispatch_record(fmt: int, hidden: int, num_topk: int) -> RecordLayout:
    """Layout of a dispatch record. Raises ValueError outside the protocol's limits."""
    return _record("epcomm_dispatch_record", fmt, hidden, num_topk, True)


def combine_record(fmt: int, hidden: int, num_topk: int, with_weights: bool) -> RecordLayout:
    """Layout of a combine record. Raises ValueError outside the protocol's limits."""
    return _record("epcomm_combine_record", fmt, hidden, num_topk, with_weights)


def align(value: int, to: int) -> int:
    """``value`` rounded up to a multiple of ``to``."""
    return -(-value // to) * to
