"""The fabric's part of libepcomm: its structures as NumPy dtypes, and its functions."""

import ctypes

from ..native import library, make_dtype, read_constants, read_fields

#: Enumerators and limits by name without ``EPCOMM_FABRIC_``.
constants = read_constants("epcomm_fabric_constants")
#: dtypes by structure name without ``epcomm_fabric_`` or ``epcomm_``. A structure's last field is
#: its size.
dtypes = {
    name: make_dtype(parts, end.offset)
    for name, (*parts, end) in read_fields("epcomm_fabric_fields").items()
}

#: Whether this build has kernels that produce triggers.
has_kernels: bool = hasattr(library, "epcomm_fabric_probe_exchange")

_POINTER, _I32, _I64, _U64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
_FUNCTIONS = {
    "host_bytes": (_I64, [_I32, _I32]),
    "producer_bytes": (_I64, [_I32]),
    "create": (_POINTER, [_POINTER, ctypes.c_char_p, ctypes.c_char_p]),
    "add_region": (_I32, [_POINTER, _POINTER]),
    "open": (_I32, [_POINTER]),
    "address": (_I64, [_POINTER, _I32, _POINTER, _I64]),
    "connect": (_I32, [_POINTER, _POINTER, _POINTER]),
    "text": (ctypes.c_char_p, [_POINTER]),
    "transports": (ctypes.c_char_p, []),
    "transport_bytes": (_I64, [ctypes.c_char_p, _I32, _I32, _I32]),
    "describe": (ctypes.c_char_p, [_POINTER]),
    "of": (_POINTER, [_POINTER]),
    "ibgda_of": (_POINTER, [_POINTER]),
    "has_atomics": (_I32, [_POINTER]),
    "count": (_I32, [_POINTER, _POINTER, _I32]),
    "keep_messages": (_I32, [_POINTER, _U64]),
    "messages": (_I64, [_POINTER, _POINTER, _I64, _POINTER]),
    "events": (_I64, [_POINTER, _POINTER, _I64, _POINTER]),
    "event_text": (ctypes.c_char_p, [_I32, _I32]),
    "check": (_I32, [_POINTER, _I64]),
    "num_losses": (ctypes.c_uint32, [_POINTER]),
    "loss_text": (ctypes.c_char_p, [_POINTER, ctypes.c_uint32, _POINTER]),
    "peer_gone": (_I32, [_POINTER, _I32]),
    "stop": (_I32, [_POINTER, _I64]),
    "destroy": (None, [_POINTER]),
    "put": (_U64, [_POINTER, _I32, _I32, _POINTER, _POINTER, _U64]),
    "put_signal": (_U64, [_POINTER, _I32, _I32, _POINTER, _POINTER, _U64, _I32]),
    "signal_add": (_U64, [_POINTER, _I32, _I32, _I32, _U64]),
    "noop": (_U64, [_POINTER, _I32]),
    "done": (_I32, [_POINTER, _I32, _U64]),
    "flush": (_I32, [_POINTER, _I32, _I64]),
    "wake": (None, [_POINTER, _I32]),
    "measure_triggers": (_I64, [_POINTER, _I32, _I32, _I32, _I32, _I64]),
    "measure_ping": (_I64, [_POINTER, _I32, _I32, _POINTER, _U64, _I32, _I32, _I64]),
    "measure_ibgda": (None, [_POINTER]),
    "probe_ibgda": (_I32, [_POINTER, _POINTER]),
    "probe_calls": (_I32, [_POINTER, _POINTER]),
    "probe_exchange": (_I32, [_POINTER, _POINTER]),
    "probe_triggers": (_I32, [_POINTER, _POINTER]),
    "probe_ping": (_I32, [_POINTER, _POINTER]),
    "probe_posting": (_I32, [_POINTER, _POINTER]),
    "probe_unread": (_I32, [_POINTER, _POINTER]),
    "probe_unread_bytes": (_I64, [_I32, _I32]),
}


def _declare() -> None:
    for name, (result, arguments) in _FUNCTIONS.items():
        if name.startswith("probe_") and not has_kernels:
            continue
        function = getattr(library, f"epcomm_fabric_{name}")
        function.restype, function.argtypes = result, arguments


_declare()

#: Names of the transports this build has.
transports: tuple[str, ...] = tuple(library.epcomm_fabric_transports().decode().split())


def describe_event(kind: int, code: int) -> str:
    """What an ``epcomm_fabric_event`` was, such as "fault: delay"."""
    text: bytes = library.epcomm_fabric_event_text(kind, code)
    return text.decode()


class Place(ctypes.Structure):
    """``epcomm_fabric_place``: a byte offset in a region."""

    _fields_ = [("region", _I32), ("reserved", _I32), ("offset", _U64)]

    def __init__(self, region: int, offset: int) -> None:
        super().__init__(region, 0, offset)
