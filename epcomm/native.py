"""libepcomm through ctypes: the protocol's integers, numbers and structures, and the counters.

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


class Constant(ctypes.Structure):
    """``epcomm_constant``."""

    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_int64)]


class _Number(ctypes.Structure):
    """``epcomm_number``."""

    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_float)]


class Field(ctypes.Structure):
    """``epcomm_field``: where a member of a structure lies."""

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
    library.epcomm_make_chunking.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_int64,
    ]
    library.epcomm_find_slot.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.epcomm_find_slot.restype = None
    library.epcomm_find_item.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p]
    library.epcomm_find_item.restype = None
    library.epcomm_count_items.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    library.epcomm_counter_add.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    library.epcomm_counter_add.restype = None
    library.epcomm_counter_read.argtypes = [ctypes.c_void_p]
    library.epcomm_counter_read.restype = ctypes.c_uint64
    library.epcomm_counter_wait.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]
    return library


library = _load()


def read_constants(function: str, source: ctypes.CDLL = library) -> dict[str, int]:
    """The integers that a library's function lists, by name."""
    count = ctypes.c_uint32()
    getattr(source, function).restype = ctypes.POINTER(Constant)
    table = getattr(source, function)(ctypes.byref(count))
    return {table[i].name.decode(): table[i].value for i in range(count.value)}


def _read_numbers() -> dict[str, np.float32]:
    count = ctypes.c_uint32()
    library.epcomm_numbers.restype = ctypes.POINTER(_Number)
    table = library.epcomm_numbers(ctypes.byref(count))
    return {table[i].name.decode(): np.float32(table[i].value) for i in range(count.value)}


def read_fields(function: str, source: ctypes.CDLL = library) -> dict[str, list[Field]]:
    """The fields that a library's function lists, by structure (without ``epcomm_``)."""
    count = ctypes.c_uint32()
    getattr(source, function).restype = ctypes.POINTER(Field)
    table = getattr(source, function)(ctypes.byref(count))
    fields: dict[str, list[Field]] = {}
    for i in range(count.value):
        fields.setdefault(table[i].structure.decode(), []).append(table[i])
    return fields


def make_dtype(fields: list[Field], itemsize: int | None) -> np.dtype:
    """The NumPy dtype of a structure."""
    formats = []
    for field in fields:
        scalar = f"{field.kind.decode()}{field.item_bytes}"
        formats.append(scalar if field.count == 1 else f"({field.count},){scalar}")
    description: Any = {
        "names": [field.field.decode() for field in fields],
        "formats": formats,
        "offsets": [field.offset for field in fields],
    }
    if itemsize is not None:
        description["itemsize"] = itemsize
    return np.dtype(description)


def make_structure(
    name: str, fields: list[Field], itemsize: int, nested: dict[str, type[ctypes.Structure]]
) -> type[ctypes.Structure]:
    """A ctypes structure: what to fill in where every microsecond counts.

    Args:
        name: of the class.
        fields: the members that Python needs; the rest is padding.
        itemsize: bytes.
        nested: structures by the name of the field that holds one as so many bytes.
    """
    members: list[tuple[str, Any]] = []
    end = 0
    for field in sorted(fields, key=lambda f: f.offset):
        field_name = field.field.decode()
        if field.offset > end:
            members.append((f"_padding{end}", ctypes.c_uint8 * (field.offset - end)))
        member: Any
        inner = nested.get(field_name)
        if inner is not None and (field.item_bytes, field.count) == (1, ctypes.sizeof(inner)):
            member = inner
        elif field.kind == b"S":
            member = ctypes.c_char * field.item_bytes
        else:
            member = _SCALARS[field.kind.decode(), field.item_bytes]
            if field.count > 1:
                member = member * field.count
        members.append((field_name, member))
        end = field.offset + ctypes.sizeof(member)
    if end < itemsize:
        members.append((f"_padding{end}", ctypes.c_uint8 * (itemsize - end)))
    # Hashed by identity, so that what is found out about one may be remembered.
    body = {"_fields_": members, "__hash__": object.__hash__}
    structure = type(name, (ctypes.Structure,), body)
    assert ctypes.sizeof(structure) == itemsize, f"{name}: {ctypes.sizeof(structure)} bytes"
    return structure


_SCALARS: dict[tuple[str, int], Any] = {
    **{("u", n): getattr(ctypes, f"c_uint{8 * n}") for n in (1, 2, 4, 8)},
    **{("i", n): getattr(ctypes, f"c_int{8 * n}") for n in (1, 2, 4, 8)},
    ("f", 4): ctypes.c_float,
    ("f", 8): ctypes.c_double,
}

#: Limits (``limit_*``), enumerators and sizes by name.
constants: dict[str, int] = read_constants("epcomm_constants")
#: The float32 numbers that define the formats, by name: csrc/protocol/formats.h.
numbers: dict[str, np.float32] = _read_numbers()
#: Fields of the protocol's structures.
fields: dict[str, list[Field]] = read_fields("epcomm_fields")
#: NumPy structured dtypes of the protocol's structures, by name without the ``epcomm_`` prefix.
dtypes: dict[str, np.dtype] = {
    name: make_dtype(parts, constants.get(f"sizeof_{name}")) for name, parts in fields.items()
}


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
