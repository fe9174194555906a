"""Windows on loan: a call's rows live in one, and tensors made from it keep it lent."""

import weakref
from collections.abc import Callable

import torch

from .engine import Engine


class _Owner:
    """The memory of a lease as torch may adopt it; dies with the last tensor over it."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
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

    def __init__(
        self, engine: Engine, serial: int, give_back: Callable[[int], None] | None = None
    ) -> None:
        self.serial = serial
        block = engine.windows[serial]
        self.nbytes = block.num_bytes
        owner = _Owner(block.pointer, block.num_bytes)
        if give_back is not None:
            weakref.finalize(owner, give_back, serial).atexit = False
        # All tensors share this one's storage, whose end lets go of the owner.
        self._flat = torch.as_tensor(owner, device=engine.device)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over part of the window; it keeps the window lent."""
        count = 1
        for extent in shape:
            count *= extent
        nbytes = count * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype, device=self._flat.device)
        return self._flat[offset : offset + nbytes].view(dtype).view(shape)


class WindowPool:
    """Windows of one purpose. Every rank has the same ones; which are free is each rank's own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._free: list[int] = []
        self._sizes: dict[int, int] = {}
        self._closed = False

    @property
    def num_free(self) -> int:
        """Windows of the largest size that this rank has not lent."""
        return sum(self._sizes[serial] == self.largest for serial in self._free)

    @property
    def largest(self) -> int:
        """Bytes of the largest window; the same on all ranks."""
        return max(self._sizes.values(), default=0)

    def add(self, nbytes: int) -> None:
        """One more window on every rank. Collective."""
        serial = self._engine.add_window(nbytes)
        self._sizes[serial] = nbytes
        self._free.append(serial)

    def lease(self, nbytes: int = 0) -> Lease | None:
        """The largest free window, or None if none of at least ``nbytes`` is free."""
        if not self._free:
            return None
        serial = max(self._free, key=lambda s: self._sizes[s])
        if self._sizes[serial] < nbytes:
            return None
        self._free.remove(serial)
        return Lease(self._engine, serial, self._give_back)

    def _give_back(self, serial: int) -> None:
        if self._closed:
            self._engine.windows[serial].close()
        else:
            self._free.append(serial)

    def close(self) -> None:
        """Free the windows; those on loan when their last tensor is gone."""
        self._closed = True
        for serial in self._free:
            self._engine.windows[serial].close()
        self._free.clear()

    def find(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """The window of this pool a tensor lies in: (serial, byte offset), or None."""
        begin = tensor.data_ptr()
        end = begin + tensor.numel() * tensor.element_size()
        for serial in self._sizes:
            block = self._engine.windows[serial]
            if block.pointer <= begin and end <= block.pointer + block.num_bytes:
                return serial, begin - block.pointer
        return None
