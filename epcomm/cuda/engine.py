"""One rank's CUDA state: control blocks, windows, and the launches of the three kernels.

Everything here is asynchronous on the caller's stream but for :meth:`Engine.wait_prepared`.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np
import torch
from cupy.cuda import runtime

from .. import native
from . import abi
from .memory import DeviceBlock, PinnedBlock, close_block, open_block

AllGather = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class Shape:
    """What a buffer was made for: ranks R, experts E, choices K."""

    rank: int
    num_ranks: int
    num_experts: int
    num_topk: int


@dataclass(frozen=True)
class Tuning:
    """How kernels are laid out on the GPU.

    Attributes:
        num_sms: thread blocks of a call; all must be resident at once.
        dispatch_warps, packing_warps: warps of a dispatch block that moves rows as they are, or
            packs them to FP8.
        dispatch_stages: rows in flight per warp, fewer where they do not fit.
        combine_warps: warps of a combine block.
    """

    num_sms: int = 16
    dispatch_warps: int = 8
    packing_warps: int = 14
    dispatch_stages: int = 2
    combine_warps: int = 20


@dataclass
class Routes:
    """Device arrays a dispatch leaves for the calls that use its routes again.

    Attributes:
        dests: 8 bytes per (token, copy), [T, D].
        rows: rows at every rank, int32 [R].
        group_start: first row of each local expert, int32 [E/R + 1] (layout expert).
        group_count: rows of each local expert without padding, int32 [E/R].
        topk_idx: global expert ids, int64 [T, K].
    """

    dests: torch.Tensor
    rows: torch.Tensor
    group_start: torch.Tensor
    group_count: torch.Tensor
    topk_idx: torch.Tensor
    epoch: int
    layout: int
    num_tokens: int


@dataclass(frozen=True)
class Agreed:
    """Arguments of a call that all ranks must share; numbers as in the protocol's enumerators."""

    op: int
    format: int
    layout: int
    alignment: int = 1
    with_weights: bool = False
    fixed_rows: int = -1
    wire: int = 0
    handle_epoch: int = 0


class Engine:
    """Control block, windows and launches of one rank.

    Args:
        shape: sizes.
        allgather: collective exchange of small objects; called here and by ``add_window``.
        max_windows: windows a rank may come to have.
        timeout: seconds a rank may stay silent.
        max_sms: most thread blocks of a call.
    """

    def __init__(
        self,
        shape: Shape,
        allgather: AllGather,
        *,
        max_windows: int = 64,
        timeout: float = 60.0,
        max_sms: int,
    ) -> None:
        self.shape = shape
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._allgather = allgather
        self.max_windows = max_windows
        self.epoch = 0
        abi.check(native.library.epcomm_cuda_load(), "loading the kernels")
        R, E = shape.num_ranks, shape.num_experts
        self._control = DeviceBlock(native.library.epcomm_cuda_control_bytes(R, E))
        runtime.memset(self._control.pointer, 0, self._control.num_bytes)
        offset = abi.dtypes["control"].fields["bad_choice"][1]  # type: ignore[index]
        self._control.array(offset, (1,), np.int32).fill(2**31 - 1)
        local = E // R
        self._report = PinnedBlock(abi.dtypes["report"].itemsize + 4 * local)
        self.report = self._report.array(0, (), abi.dtypes["report"])
        self.local_expert_rows = self._report.array(
            abi.dtypes["report"].itemsize, (local,), np.int32
        )
        self._no_rows = cupy.zeros(R, np.int32)
        self._block_bins = cupy.empty((max_sms, R + E), np.int32)
        self.windows: list[DeviceBlock] = []
        self.free_windows = 0  # that this rank will announce
        self._table = np.zeros((R, max_windows), np.uint64)
        self._device_table = cupy.zeros((R, max_windows), np.uint64)
        self._opened: list[int] = []
        runtime.deviceSynchronize()
        controls = self._exchange(self._control)
        self._world = self._make_world(controls, timeout)
        self._templates = {
            name: self._make_template(name) for name in ("layout", "dispatch", "combine")
        }

    def _exchange(self, block: DeviceBlock) -> list[int]:
        """Share a block of every rank with all; returns their addresses here. Collective."""
        addresses = []
        for rank, handle in enumerate(self._allgather(block.handle())):
            if rank == self.shape.rank:
                addresses.append(block.pointer)
            else:
                self._opened.append(open_block(handle))
                addresses.append(self._opened[-1])
        return addresses

    def _make_world(self, controls: list[int], timeout: float) -> np.ndarray:
        world = np.zeros((), abi.dtypes["world"])
        world["rank"] = self.shape.rank
        world["num_ranks"] = self.shape.num_ranks
        world["num_experts"] = self.shape.num_experts
        world["num_topk"] = self.shape.num_topk
        world["num_windows"] = self.max_windows
        world["timeout_ns"] = int(timeout * 1e9)
        world["controls"][: len(controls)] = controls
        world["windows"] = self._device_table.data.ptr
        world["report"] = self._report.pointer
        world["block_bins"] = self._block_bins.data.ptr
        return world

    def _make_template(self, name: str) -> np.ndarray:
        call = np.zeros((), abi.dtypes[name])
        call["world"] = self._world.reshape(1).view(np.uint8)
        return call

    # Windows --------------------------------------------------------------------------------

    def add_window(self, num_bytes: int) -> int:
        """Give every rank one more window; returns its serial number. Collective.

        Raises:
            MemoryError: there are ``max_windows`` already.
        """
        serial = len(self.windows)
        if serial == self.max_windows:
            raise MemoryError(
                f"all {serial} windows of this buffer are in use: results of earlier calls keep "
                "them; drop those results, or copy what is needed of them"
            )
        block = DeviceBlock(num_bytes)
        self.windows.append(block)
        self._table[:, serial] = self._exchange(block)
        self._device_table.set(self._table)
        runtime.deviceSynchronize()
        return serial

    # Launches -------------------------------------------------------------------------------

    def _announcement(self, call: np.ndarray, agreed: Agreed) -> np.ndarray:
        announcement = abi.part(call, "announcement", native.dtypes["announcement"])
        announcement["op"] = agreed.op
        announcement["format"] = agreed.format
        announcement["layout"] = agreed.layout
        announcement["alignment"] = agreed.alignment
        announcement["with_weights"] = agreed.with_weights
        announcement["fixed_rows"] = agreed.fixed_rows
        announcement["wire"] = agreed.wire
        announcement["handle_epoch"] = agreed.handle_epoch
        return announcement

    def _launch(self, name: str, call: np.ndarray, stream: int) -> None:
        function = getattr(native.library, f"epcomm_cuda_launch_{name}")
        abi.check(function(call.ctypes.data, stream), f"launching {name}")

    def row(self, fmt: int, hidden: int, layout: int, *, topk: bool, weights: bool) -> np.ndarray:
        """Describe an output row (``epcomm_cuda_row``)."""
        row = np.zeros((), abi.dtypes["row"])
        row["row_bytes"] = native.library.epcomm_payload_bytes(fmt, hidden)
        row["scale_bytes"] = native.library.epcomm_scale_bytes(fmt, hidden)
        row["num_topk"] = self.shape.num_topk
        row["layout"] = layout
        row["with_topk"] = topk
        row["with_weights"] = weights
        return row

    def parts(self, row: np.ndarray, num_rows: int) -> np.ndarray:
        """Where the parts of ``num_rows`` rows lie in a window (``epcomm_cuda_parts``)."""
        parts = np.zeros((), abi.dtypes["parts"])
        native.library.epcomm_cuda_window_parts(row.ctypes.data, num_rows, parts.ctypes.data)
        return parts

    def max_dests(self, layout: int) -> int:
        """D: copies of a token at most."""
        by_expert = layout == native.constants["LAYOUT_EXPERT"]
        return self.shape.num_topk if by_expert else min(self.shape.num_topk, self.shape.num_ranks)

    def make_routes(self, topk_idx: torch.Tensor, layout: int) -> Routes:
        """Unwritten routes for :meth:`layout` to fill."""
        num_tokens = topk_idx.shape[0]
        local = self.shape.num_experts // self.shape.num_ranks
        R, device = self.shape.num_ranks, topk_idx.device
        ints = torch.empty(R + 2 * local + 1, dtype=torch.int32, device=device)
        D = self.max_dests(layout)
        return Routes(
            dests=torch.empty((num_tokens, D), dtype=torch.int64, device=device),
            rows=ints[:R],
            group_start=ints[R : R + local + 1],
            group_count=ints[R + local + 1 :],
            topk_idx=topk_idx,
            epoch=self.epoch + 1,
            layout=layout,
            num_tokens=num_tokens,
        )

    def _window(self, announcement: np.ndarray, serial: int | None) -> None:
        """Announce a window; None: this rank has none to offer, and all agree to grow."""
        announcement["window_fd"] = self.free_windows
        if serial is not None:
            announcement["window_serial"] = serial
            announcement["window_bytes"] = self.windows[serial].num_bytes

    def layout(
        self,
        agreed: Agreed,
        row: np.ndarray,
        routes: Routes,
        window: int | None,
        tuning: Tuning,
        stream: int,
    ) -> None:
        """Count, announce and place: the first half of a first dispatch."""
        call = self._templates["layout"].copy()
        announcement = self._announcement(call, agreed)
        announcement["num_tokens"] = routes.num_tokens
        self._window(announcement, window)
        call["row"] = row.reshape(1).view(np.uint8)
        call["topk_idx"] = routes.topk_idx.data_ptr()
        call["dests"] = routes.dests.data_ptr()
        call["rows"] = routes.rows.data_ptr()
        call["group_start"] = routes.group_start.data_ptr()
        call["group_count"] = routes.group_count.data_ptr()
        call["num_tokens"] = routes.num_tokens
        call["max_dests"] = self.max_dests(routes.layout)
        call["num_blocks"] = tuning.num_sms
        self._launch("layout", call, stream)

    def wait_prepared(self, epoch: int, timeout: float) -> int:
        """Wait for the layout kernel's verdict on ``epoch``. Returns 0, 1 (failed) or 2."""
        return int(
            native.library.epcomm_cuda_wait_prepared(
                self._report.pointer, epoch, int(timeout * 1e9)
            )
        )

    def dispatch(
        self,
        agreed: Agreed,
        row: np.ndarray,
        routes: Routes,
        window: int | None,
        tuning: Tuning,
        stream: int,
        *,
        x: int,
        row_in_bytes: int,
        input_format: int,
        scales: int = 0,
        topk_weights: int = 0,
        announce: bool = False,
    ) -> None:
        """Move the rows. Pointers are device addresses; ``announce`` for cached routes."""
        call = self._templates["dispatch"].copy()
        announcement = self._announcement(call, agreed)
        announcement["num_tokens"] = routes.num_tokens
        self._window(announcement, window)
        call["row"] = row.reshape(1).view(np.uint8)
        call["x"] = x
        call["scales"] = scales
        call["topk_idx"] = routes.topk_idx.data_ptr()
        call["topk_weights"] = topk_weights
        call["dests"] = routes.dests.data_ptr()
        call["rows"] = routes.rows.data_ptr()
        call["group_start"] = routes.group_start.data_ptr()
        call["group_count"] = routes.group_count.data_ptr()
        call["num_tokens"] = routes.num_tokens
        call["max_dests"] = self.max_dests(routes.layout)
        call["row_in_bytes"] = row_in_bytes
        call["input_format"] = input_format
        call["announce"] = announce
        call["num_blocks"] = tuning.num_sms
        packs = input_format != agreed.format
        call["num_warps"] = tuning.packing_warps if packs else tuning.dispatch_warps
        call["stages"] = tuning.dispatch_stages
        self._launch("dispatch", call, stream)
        self.epoch += 1

    def combine(
        self,
        agreed: Agreed,
        routes: Routes,
        window: int | None,
        tuning: Tuning,
        stream: int,
        *,
        row_bytes: int,
        out: int,
        rows_offset: int = 0,
        weights_offset: int = -1,
        topk_offset: int = 0,
        bias: tuple[int, ...] = (),
        topk_weights: int = 0,
    ) -> None:
        """Sum the rows of every token. ``weights_offset`` < 0: rows carry no weight."""
        call = self._templates["combine"].copy()
        announcement = self._announcement(call, agreed)
        announcement["num_tokens"] = routes.num_tokens
        self._window(announcement, window)
        announcement["rows_offset"] = rows_offset
        announcement["row_weights"] = weights_offset >= 0
        announcement["weights_offset"] = max(weights_offset, 0)
        announcement["topk_offset"] = topk_offset
        call["dests"] = routes.dests.data_ptr()
        call["bias"][: len(bias)] = bias
        call["out"] = out
        call["topk_idx"] = routes.topk_idx.data_ptr()
        call["topk_weights"] = topk_weights
        call["num_tokens"] = routes.num_tokens
        call["max_dests"] = self.max_dests(routes.layout)
        call["row_bytes"] = row_bytes
        call["layout"] = routes.layout
        call["num_blocks"] = tuning.num_sms
        call["num_threads"] = 32 * tuning.combine_warps
        self._launch("combine", call, stream)
        self.epoch += 1

    def refuse(self, op: int, reason: str, stream: int) -> None:
        """Take part in a call as the rank whose arguments were refused: nobody moves data."""
        combines = op == native.constants["OP_COMBINE"]
        call = self._templates["combine" if combines else "dispatch"].copy()
        announcement = self._announcement(call, Agreed(op, 0, 0))
        announcement["status"] = native.constants["STATUS_REFUSED"]
        announcement["reason"] = reason.encode()[: native.constants["REASON_BYTES"]]
        call["num_blocks"] = 1
        if combines:
            call["num_threads"] = 32
            call["max_dests"] = 1
        else:
            call["num_warps"] = call["stages"] = 1
            call["announce"] = 1
            call["rows"] = self._no_rows.data.ptr
            call["row_in_bytes"] = 16
        self._launch("combine" if combines else "dispatch", call, stream)
        self.epoch += 1

    # Errors and lifetime --------------------------------------------------------------------

    def announcement_of(self, rank: int, epoch: int) -> np.ndarray:
        """What ``rank`` announced for ``epoch``, copied from the device (blocks)."""
        record = np.zeros((), native.dtypes["announcement"])
        offset = native.library.epcomm_cuda_announcement_offset(
            self.shape.num_ranks, self.shape.num_experts, rank, epoch
        )
        runtime.memcpy(
            record.ctypes.data,
            self._control.pointer + offset,
            record.nbytes,
            runtime.memcpyDeviceToHost,
        )
        return record

    def stamps(self) -> np.ndarray:
        """Moments of the last data kernel (``epcomm_cuda_stamp``), int64 ns (blocks)."""
        offset = abi.dtypes["control"].fields["stamps"][1]  # type: ignore[index]
        stamps = np.zeros(abi.constants["STAMPS"], np.int64)
        runtime.memcpy(
            stamps.ctypes.data,
            self._control.pointer + offset,
            stamps.nbytes,
            runtime.memcpyDeviceToHost,
        )
        return stamps

    def error(self) -> np.ndarray | None:
        """The error record (``epcomm_cuda_error``), or None."""
        if not int(self.report["failed"]):
            return None
        return abi.part(self.report, "error", abi.dtypes["error"]).copy()

    def close(self) -> None:
        """Unmap and free all but the windows; the ranks must have stopped using the memory."""
        for pointer in self._opened:
            close_block(pointer)
        self._opened.clear()
        self._control.close()
        self._report.close()


assert ctypes.sizeof(ctypes.c_void_p) == 8, "addresses are 64 bits wide"
