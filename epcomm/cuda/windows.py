"""Windows on loan: a call's rows live in one, and tensors made from it keep it lent."""

import weakref
from collections.abc import Callable

import torch

from .engine import Engine
from .streams import Calls

#: Integers as wide as an element: NumPy's names for types know neither BF16 nor FP8.
_INTEGER = {1: ("|u1", torch.uint8), 2: ("<i2", torch.int16), 4: ("<i4", torch.int32)}
_INTEGER[8] = ("<i8", torch.int64)


class _Loan:
    """What every tensor over a lent window keeps alive; the window goes back when it dies."""


class _Part:
    """Part of a lent window as torch may adopt it."""

    def __init__(self, pointer: int, shape: tuple[int, ...], typestr: str, loan: _Loan) -> None:
        self.loan = loan
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


class Lease:
    """A window lent for one call's rows.

    Attributes:
        serial: its number.
        nbytes: its size.
    """

    def __init__(self, engine: Engine, serial: int, give_back: Callable[[int], None]) -> None:
        self.serial = serial
        block = engine.windows[serial]
        self.nbytes = block.num_bytes
        self._pointer = block.pointer
        self._device = engine.device
        self._loan = _Loan()
        weakref.finalize(self._loan, give_back, serial).atexit = False

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over part of the window; it keeps the window lent."""
        if 0 in shape:
            return torch.empty(shape, dtype=dtype, device=self._device)
        typestr, integer = _INTEGER[dtype.itemsize]
        part = _Part(self._pointer + offset, shape, typestr, self._loan)
        tensor = torch.as_tensor(part, device=self._device)
        return tensor if dtype == integer else tensor.view(dtype)


class WindowPool:
    """Windows of one purpose. Every rank has the same ones; which are free is each rank's own.

    A window that a call captured into a CUDA graph uses is from then on for captured calls alone:
    the graph's replays write it without asking.

    Attributes:
        largest: bytes of the largest window; the same on all ranks.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._free: list[int] = []
        self._free_for_graphs: list[int] = []
        self._for_graphs: set[int] = set()
        self._sizes: dict[int, int] = {}
        self._streams: dict[int, torch.cuda.Stream] = {}  # that last used a window's rows
        self._closed = False
        self.largest = 0

    @property
    def num_free(self) -> int:
        """Windows of the largest size that this rank has not lent."""
        largest = self.largest
        return sum([self._sizes[serial] == largest for serial in self._free])

    def count(self, nbytes: int) -> int:
        """Windows of at least ``nbytes``, lent or not; the same on all ranks."""
        return sum([size >= nbytes for size in self._sizes.values()])

    def add(self, nbytes: int) -> None:
        """One more window on every rank. Collective."""
        serial = self._engine.add_window(nbytes)
        self._sizes[serial] = nbytes
        self.largest = max(self.largest, nbytes)
        self._free.append(serial)

    def lease(self, nbytes: int, calls: Calls) -> Lease | None:
        """The largest free window, or None if none of at least ``nbytes`` is free."""
        serial = self.borrow(nbytes, calls)
        if serial is None:
            return None
        (self._free_for_graphs if serial in self._for_graphs else self._free).remove(serial)
        self._streams[serial] = calls.caller
        return Lease(self._engine, serial, self._give_back)

    def borrow(self, nbytes: int, calls: Calls) -> int | None:
        """As ``lease``, for the length of one call: the next borrower's call waits for this one."""
        serial = self._best(self._free_for_graphs if calls.capturing else self._free, nbytes)
        if serial is None and calls.capturing:
            serial = self._best(self._free, nbytes)
            if serial is not None:
                self._free.remove(serial)
                self._free_for_graphs.append(serial)
                self._for_graphs.add(serial)
        # Whoever let go of the rows may still be reading them on another stream.
        last = self._streams.get(serial) if serial is not None else None
        if last is not None and not calls.capturing and last != calls.stream:
            self._engine.order(last.cuda_stream, calls.stream.cuda_stream)
        return serial

    def _best(self, free: list[int], nbytes: int) -> int | None:
        serial = max(free, key=self._sizes.__getitem__, default=None)
        return None if serial is None or self._sizes[serial] < nbytes else serial

    def _give_back(self, serial: int) -> None:
        if self._closed:
            self._engine.windows[serial].close()
        elif serial in self._for_graphs:
            self._free_for_graphs.append(serial)
        else:
            self._free.append(serial)

    def close(self) -> None:
        """Free the windows; those on loan when their last tensor is gone."""
        self._closed = True
        for serial in self._free + self._free_for_graphs:
            self._engine.windows[serial].close()
        self._free.clear()
        self._free_for_graphs.clear()

    def find(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """The window of this pool a tensor lies in: (serial, byte offset), or None."""
        begin = tensor.data_ptr()
        end = begin + tensor.numel() * tensor.element_size()
        for serial in self._sizes:
            block = self._engine.windows[serial]
            if block.pointer <= begin and end <= block.pointer + block.num_bytes:
                return serial, begin - block.pointer
        return None
