"""Device and pinned memory, and the mapping of other ranks' device memory by CUDA IPC."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime

from ..errors import PeerError

AllGather = Callable[[Any], list[Any]]

_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation
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


class SharedBlock:
    """A block on every rank, mapped by the ranks of its node.

    Making one is collective over all ranks, also where it fails.

    Args:
        num_bytes: of every block.
        rank: this rank.
        node_ranks: whose blocks are mapped here, this rank included.
        allgather: exchange of small objects among all ranks.

    Attributes:
        block: this rank's, zeroed.
        addresses: where the blocks of ``node_ranks`` are here.

    Raises:
        MemoryError: this rank's GPU has no memory left.
        OSError: memory cannot be shared with another rank by CUDA IPC.
        PeerError: one of these on another rank.
    """

    def __init__(
        self, num_bytes: int, rank: int, node_ranks: Sequence[int], allgather: AllGather
    ) -> None:
        self.block: DeviceBlock | None = None
        self.addresses: list[int] = []
        self._rank, self._node_ranks = rank, node_ranks
        handles = self._attempt(lambda: self._make(num_bytes), allgather)
        self._attempt(lambda: self._map(handles), allgather)

    def _make(self, num_bytes: int) -> bytes:
        try:
            self.block = DeviceBlock(num_bytes)
        except runtime.CUDARuntimeError as error:
            if error.status != _MEMORY_ALLOCATION:
                raise
            free, total = runtime.memGetInfo()
            raise MemoryError(
                f"no {num_bytes >> 20} MiB of GPU memory for a window: {free >> 20} of "
                f"{total >> 20} MiB are free; torch.cuda.empty_cache() may free some"
            ) from error
        runtime.memset(self.block.pointer, 0, self.block.num_bytes)
        runtime.deviceSynchronize()
        return self.block.handle()

    def _map(self, handles: list[bytes]) -> None:
        assert self.block is not None
        for rank in self._node_ranks:
            own = rank == self._rank
            self.addresses.append(self.block.pointer if own else open_block(handles[rank]))

    def _attempt(self, step: Callable[[], Any], allgather: AllGather) -> list[Any]:
        """Take a step on all ranks; returns what it returned on each."""
        result, failure = None, None  # type: Any, Exception | None
        try:
            result = step()
        except MemoryError as error:
            failure = error
        except runtime.CUDARuntimeError as error:
            owner = self._node_ranks[len(self.addresses)]
            failure = OSError(
                f"rank {owner}'s GPU memory cannot be shared by CUDA IPC: {error}. "
                "The ranks of a node must be processes of one machine that share an IPC and a "
                "process namespace (containers: one for all ranks, or --ipc=host --pid=host)"
            )
            failure.__cause__ = error
        answers = allgather((None if failure is None else str(failure), result))
        failed = {r: why for r, (why, _) in enumerate(answers) if why is not None}
        if failed:
            self.unmap()
            if self.block is not None:
                self.block.close()
        if failure is not None:
            raise failure
        if failed:
            reasons = "; ".join(f"rank {r}: {why}" for r, why in failed.items())
            raise PeerError(f"no window on other ranks: {reasons}", tuple(failed))
        return [value for _, value in answers]

    def unmap(self) -> None:
        """Let go of the other ranks' blocks; this rank's stays."""
        # Where mapping failed half-way there are fewer addresses than ranks.
        for rank, address in zip(self._node_ranks, self.addresses, strict=False):
            if rank != self._rank:
                close_block(address)
        self.addresses = []


def open_block(handle: bytes) -> int:
    """Map another process's block; returns its address here."""
    return int(runtime.ipcOpenMemHandle(handle))


def close_block(pointer: int) -> None:
    """Unmap what :func:`open_block` returned."""
    runtime.ipcCloseMemHandle(pointer)
