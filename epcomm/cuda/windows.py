"""Windows on loan: a call's rows live in one, and tensors made from it keep it lent."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from .. import native
from . import abi
from .engine import Engine
from .streams import Calls

#: Integers as wide as an element, for types that this torch does not pass by DLPack.
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_NAME = ctypes.c_char_p(b"dltensor")
_make_capsule: Any = ctypes.pythonapi["PyCapsule_New"]  # not the one that others declare
_make_capsule.restype = ctypes.py_object
_read_capsule: Any = ctypes.pythonapi["PyCapsule_GetPointer"]
_read_capsule.restype = ctypes.c_void_p
_read_capsule.argtypes = [ctypes.py_object, ctypes.c_char_p]


_lend: Any = native.library.epcomm_cuda_loan_lend


@cache
def _kind_of(dtype: torch.dtype) -> tuple[int, int, torch.dtype | None]:
    """DLPack's code and bits of a type; the type to view it as where DLPack lacks it."""
    try:
        capsule = to_dlpack(torch.zeros(1, dtype=dtype))
        view = abi.structures["view"].from_address(_read_capsule(capsule, b"dltensor"))
        kind = view.code, view.bits, None
        if from_dlpack(capsule).dtype == dtype:
            return kind
    except (RuntimeError, BufferError, TypeError):
        pass
    code, bits, _ = _kind_of(_INTEGER[dtype.itemsize])
    return code, bits, dtype


class _View:
    """Part of a window as the library describes it to torch.

    Attributes:
        reference: to the structure, which spares a conversion for every call.
    """

    __slots__ = ("_extents", "_seen_as", "_shown", "_view", "reference")

    def __init__(self, view: Any) -> None:
        self._view, self._extents = view, view.extents
        self.reference = ctypes.byref(view)
        self._shown: tuple[int, tuple[int, ...], torch.dtype] | None = None
        self._seen_as: torch.dtype | None = None

    def show(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype | None:
        """Describe this; returns the type to view the tensor as where DLPack lacks it."""
        shown = (address, shape, dtype)
        if shown != self._shown:
            view, extents = self._view, self._extents
            view.data = address
            view.code, view.bits, self._seen_as = _kind_of(dtype)
            view.ndim = len(shape)
            extents[0], extents[1] = shape[0], shape[-1]
            self._shown = shown
        return self._seen_as


class Window:
    """One of this rank's windows; several tensors may show parts of it at a time.

    Attributes:
        serial: its number.
        nbytes: its size.
        pointer: its address.
        loan: ``epcomm_cuda_loan``; the window is lent while it has holders beside the buffer.
        last_stream: address of the stream that last used its rows, or None.
    """

    def __init__(self, engine: Engine, serial: int) -> None:
        block = engine.windows[serial]
        self.serial, self.nbytes, self.pointer = serial, block.num_bytes, block.pointer
        self.last_stream: int | None = None
        address = native.library.epcomm_cuda_loan_open(block.pointer, engine.device.index)
        if not address:
            raise MemoryError("no host memory for a window")
        self._address: int = address
        self.loan = abi.structures["loan"].from_address(address)
        view, start = abi.structures["view"], abi.structures["loan"].views.offset
        self._views = [
            _View(view.from_address(address + start + i * ctypes.sizeof(view)))
            for i in range(abi.constants["VIEWS"])
        ]
        self._used = 0  # views of the present loan

    def lend(
        self, offset: int, shape: tuple[int, ...], dtype: torch.dtype, stream: int
    ) -> torch.Tensor:
        """The first tensor of a new loan, used on the stream at this address."""
        self._used = 0
        self.last_stream = stream
        return self.tensor(offset, shape, dtype)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over part of the window; it keeps the window lent."""
        view = self._views[self._used]
        self._used += 1
        seen_as = view.show(self.pointer + offset, shape, dtype)
        reference = view.reference
        _lend(reference)
        tensor = from_dlpack(_make_capsule(reference, _NAME, None))
        return tensor if seen_as is None else tensor.view(seen_as)

    def close(self) -> None:
        """Free the memory, or let the last tensor do so."""
        native.library.epcomm_cuda_loan_close(self._address)


class WindowPool:
    """Windows of one purpose. Every rank has the same ones; which are free is each rank's own.

    A window that a call captured into a CUDA graph uses is from then on for captured calls alone:
    the graph's replays write it without asking.

    Attributes:
        largest: bytes of the largest window; the same on all ranks.
        num_left: windows of that size, not for graphs, that are free beside the one borrowed last.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._windows: list[Window] = []
        self._for_graphs: list[Window] = []
        self.largest = 0
        self.num_left = 0

    @property
    def _all(self) -> list[Window]:
        return self._windows + self._for_graphs

    def count(self, nbytes: int) -> int:
        """Windows of at least ``nbytes``, lent or not; the same on all ranks."""
        return sum([window.nbytes >= nbytes for window in self._all])

    def add(self, nbytes: int) -> None:
        """One more window on every rank. Collective."""
        window = Window(self._engine, self._engine.add_window(nbytes))
        self.largest = max(self.largest, window.nbytes)
        self._windows.append(window)

    def borrow(self, nbytes: int, calls: Calls) -> Window | None:
        """The largest free window, or None if none of at least ``nbytes`` is free.

        It is free again once the call is made, unless a tensor of it has been: the next borrower's
        call waits for this one.
        """
        window, size, left, largest = None, nbytes - 1, 0, self.largest
        for one in self._windows:
            if one.loan.holders == 1:
                held = one.nbytes
                if held == largest:
                    left += 1
                if held > size:
                    window, size = one, held
        self.num_left = left - (size == largest)
        if calls.capturing:
            return self._reserve(window, nbytes)
        if window is not None:
            # Whoever let go of the rows may still be reading them on another stream.
            last = window.last_stream
            if last is not None and last != calls.address:
                self._engine.order(last, calls.address)
        return window

    def _reserve(self, window: Window | None, nbytes: int) -> Window | None:
        """A window for graphs; ``window`` becomes one if none of them is free."""
        free = [w for w in self._for_graphs if w.loan.holders == 1 and w.nbytes >= nbytes]
        if free:
            return max(free, key=lambda w: w.nbytes)
        if window is not None:
            self._windows.remove(window)
            self._for_graphs.append(window)
        return window

    def close(self) -> None:
        """Free the windows; those on loan when their last tensor is gone."""
        for window in self._all:
            window.close()
        self._windows.clear()
        self._for_graphs.clear()

    def find(self, tensor: torch.Tensor) -> tuple[Window, int] | None:
        """The window of this pool a tensor lies in, and its byte offset there; or None."""
        begin = tensor.data_ptr()
        end = begin + tensor.nbytes
        for windows in (self._windows, self._for_graphs):
            for window in windows:
                if window.pointer <= begin and end <= window.pointer + window.nbytes:
                    return window, begin - window.pointer
        return None
