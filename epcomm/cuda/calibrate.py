"""Measures, on this GPU, how fast its SMs, its memory and its link to another GPU move rows."""

import cupy
import numpy as np
import torch

from .. import native
from . import abi
from .memory import DeviceBlock, close_block, open_block

# Like a dispatch: as many warps a block, rows of 7168 bytes and more, several copies of each.
_ROW_BYTES = 8192
_COPIES = 4
_WARPS = 8
# Rows of every block: a launch takes some 0.1 ms however many blocks it has.
_ROWS_PER_BLOCK = 192
#: Written to in turn: more than the L2 caches, so that the memory is measured.
_WRITTEN_BYTES = 192 << 20
_READ_BYTES = 64 << 20
_LINK_BYTES = 64 << 20
_REPEATS = 3


class GpuProbe:
    """What :func:`epcomm.cuda.rates.agree_on_rates` asks of a GPU.

    Args:
        index: as torch counts them; becomes the current device of CuPy and the library.
        sms: of it.
    """

    def __init__(self, index: int, sms: int) -> None:
        cupy.cuda.Device(index).use()
        self.sms = sms
        self._blocks: list[DeviceBlock] = []
        self._mapped = 0

    def memory(self, block_counts: tuple[int, ...]) -> tuple[float, ...]:
        """Bytes read and written per second in this GPU's memory, for every number of blocks."""
        abi.check(native.library.epcomm_cuda_load(), "loading the kernels")
        source, target = DeviceBlock(_READ_BYTES), DeviceBlock(_WRITTEN_BYTES)
        try:
            return tuple(
                _rate(
                    _call(source, target.pointer, target.num_bytes, blocks),
                    _ROWS_PER_BLOCK * blocks * (1 + _COPIES) * _ROW_BYTES,
                )
                for blocks in block_counts
            )
        finally:
            source.close()
            target.close()

    def offer(self) -> bytes:
        """Memory for another GPU to write to: what its :meth:`link` needs."""
        self._blocks = [DeviceBlock(_LINK_BYTES) for _ in range(2)]
        return self._blocks[0].handle()

    def map(self, offered: bytes) -> None:
        """Reach what another GPU offers."""
        self._mapped = open_block(offered)

    def link(self) -> float:
        """Bytes per second that all SMs store there."""
        return _rate(
            _call(self._blocks[1], self._mapped, _LINK_BYTES, self.sms),
            _ROWS_PER_BLOCK * self.sms * _COPIES * _ROW_BYTES,
        )

    def unmap(self) -> None:
        """Let go of what :meth:`map` reached."""
        pointer, self._mapped = self._mapped, 0
        if pointer:
            close_block(pointer)

    def withdraw(self) -> None:
        """Free what was offered; nobody may have it mapped any more."""
        for block in self._blocks:
            block.close()
        self._blocks.clear()


def _rate(call: np.ndarray, num_bytes: int) -> float:
    """Bytes per second of the fastest of a few launches."""
    stream = torch.cuda.current_stream()
    best = float("inf")
    for _ in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        abi.check(
            native.library.epcomm_cuda_launch_calibrate(call.ctypes.data, stream.cuda_stream),
            "measuring the GPU's rates",
        )
        end.record(stream)
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e-3)
    return num_bytes / best


def _call(source: DeviceBlock, target: int, target_bytes: int, blocks: int) -> np.ndarray:
    call = np.zeros((), abi.dtypes["calibrate"])
    call["from"] = source.pointer
    call["to"] = target
    call["from_rows"] = source.num_bytes // _ROW_BYTES
    call["to_rows"] = target_bytes // _ROW_BYTES
    call["num_rows"] = _ROWS_PER_BLOCK * blocks
    call["row_bytes"] = _ROW_BYTES
    call["copies"] = _COPIES
    call["num_blocks"] = blocks
    call["num_warps"] = _WARPS
    return call
