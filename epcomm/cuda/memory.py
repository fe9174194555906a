"""Device and pinned memory, and the mapping of other ranks' device memory by CUDA IPC."""

import ctypes
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime

_HOST_ALLOC_MAPPED = 2  # cudaHostAllocMapped


# cudaMalloc cuts smaller allocations from a common one, which a process can map only once.
_IPC_GRANULE = 2 << 20


class DeviceBlock:
    """Device memory of this process, made by ``cudaMalloc`` so that IPC can share it."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = max(1, -(-num_bytes // _IPC_GRANULE)) * _IPC_GRANULE
        self.pointer: int = runtime.malloc(self.num_bytes)

    def handle(self) -> bytes:
        """What :func:`open_block` needs in another process."""
        return bytes(runtime.ipcGetMemHandle(self.pointer))

    def array(self, offset: int, shape: tuple[int, ...], dtype: Any) -> cupy.ndarray:
        """Part of the block as an array that keeps the block alive."""
        dtype = np.dtype(dtype)
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if offset + num_bytes > self.num_bytes:
            raise ValueError(f"bytes {offset}..{offset + num_bytes} of {self.num_bytes}")
        memory = cupy.cuda.UnownedMemory(self.pointer + offset, num_bytes, self)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))

    def close(self) -> None:
        """Free the memory; nothing may use it any more."""
        pointer, self.pointer = self.pointer, 0
        if pointer:
            runtime.free(pointer)


class PinnedBlock:
    """Zeroed page-locked host memory at the same address on host and device."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.pointer: int = runtime.hostAlloc(num_bytes, _HOST_ALLOC_MAPPED)
        ctypes.memset(self.pointer, 0, num_bytes)

    def array(self, offset: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Part of the block as a NumPy view; it dangles once the block is closed."""
        dtype = np.dtype(dtype)
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        raw = (ctypes.c_uint8 * num_bytes).from_address(self.pointer + offset)
        return np.frombuffer(raw, dtype).reshape(shape)

    def close(self) -> None:
        """Free the memory."""
        pointer, self.pointer = self.pointer, 0
        if pointer:
            runtime.freeHost(pointer)


def open_block(handle: bytes) -> int:
    """Map another process's block; returns its address here."""
    return int(runtime.ipcOpenMemHandle(handle))


def close_block(pointer: int) -> None:
    """Unmap what :func:`open_block` returned."""
    runtime.ipcCloseMemHandle(pointer)
