"""Shared memory of a node: anonymous files that peers open through /proc.

A segment is a memfd: sparse (pages exist once touched), not bounded by the size of /dev/shm, and
gone with the last process that maps it, however that process ended.
"""

import ctypes
import mmap
import os
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch


class Segment:
    """A mapped stretch of memory that other processes of the host may map too.

    Attributes:
        fd: descriptor in the owner's process (peers name it to open the segment).
        address: where it is mapped here.
        nbytes: its size.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        self.nbytes = nbytes
        self.map = mmap.mmap(fd, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    @classmethod
    def create(cls, name: str, nbytes: int) -> "Segment":
        """Make a segment of ``nbytes`` zeros. Raises OSError when the kernel refuses."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        segment = cls(fd, nbytes)
        # The peers open it through this process's descriptor, so that must outlive the segment's
        # users here; it closes with the Segment.
        weakref.finalize(segment, os.close, fd)
        return segment

    @classmethod
    def open_peer(cls, pid: int, fd: int, nbytes: int) -> "Segment":
        """Map a segment that process ``pid`` made.

        Raises:
            OSError: the process is gone, or this one may not look at it.
        """
        path = f"/proc/{pid}/fd/{fd}"
        try:
            here = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot map the shared memory of process {pid} ({error.strerror}); ranks of a "
                "node must run as one user in one PID namespace. Give each container its own "
                "node with ranks_per_node if they cannot",
                path,
            ) from error
        try:
            return cls(here, nbytes)
        finally:
            os.close(here)

    def array(self, offset: int, nbytes: int) -> np.ndarray:
        """A uint8 view."""
        return np.frombuffer(self.map, np.uint8, nbytes, offset)


class Lease:
    """A segment lent for one call's rows; tensors made from it keep it lent.

    The segment returns to its pool once the lease and every tensor that shares its memory are
    gone, so a peer is never told to write where somebody still reads.
    """

    def __init__(self, segment: Segment, serial: int) -> None:
        self.segment = segment
        self.serial = serial
        self.keeper: Any = (ctypes.c_uint8 * segment.nbytes).from_buffer(segment.map)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over part of the segment; it holds the lease."""
        count = int(np.prod(shape))
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if dtype == torch.float8_e4m3fn:
            flat = torch.frombuffer(self.keeper, dtype=torch.uint8, count=count, offset=offset)
            return flat.view(dtype).view(shape)
        return torch.frombuffer(self.keeper, dtype=dtype, count=count, offset=offset).view(shape)


class WindowPool:
    """Windows of this rank, kept apart by purpose so that each purpose finds its pages warm.

    A window is made when all of its purpose are lent, and reused last-in first-out.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._free: dict[str, deque[tuple[Segment, int]]] = {}
        self._made: list[Segment] = []

    def lease(self, purpose: str) -> Lease:
        """Lend a window. Raises OSError when the kernel gives no more memory."""
        free = self._free.setdefault(purpose, deque())
        try:
            segment, serial = free.pop()
        except IndexError:
            segment, serial = Segment.create(f"epcomm-{purpose}", self.nbytes), len(self._made)
            self._made.append(segment)
        lease = Lease(segment, serial)
        weakref.finalize(lease.keeper, free.append, (segment, serial))
        return lease

    def address(self, serial: int) -> int:
        """Where a window is mapped in this process."""
        return self._made[serial].address

    def find(self, tensor: torch.Tensor) -> tuple[Segment, int, int] | None:
        """The window a tensor lies in: (segment, serial, byte offset), or None."""
        begin = tensor.data_ptr()
        end = begin + tensor.numel() * tensor.element_size()
        for serial, segment in enumerate(self._made):
            if segment.address <= begin and end <= segment.address + segment.nbytes:
                return segment, serial, begin - segment.address
        return None


class PeerWindows:
    """Windows of the node's other ranks, mapped when first announced and kept."""

    def __init__(self) -> None:
        self._open: dict[tuple[int, int], Segment] = {}

    def address(self, pid: int, fd: int, serial: int, nbytes: int) -> int:
        """Where the window is mapped here. Raises OSError as Segment.open_peer does."""
        key = (pid, serial)
        if key not in self._open:
            self._open[key] = Segment.open_peer(pid, fd, nbytes)
        return self._open[key].address
