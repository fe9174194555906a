"""One rank's CUDA state: control blocks, windows, and the launches of the three kernels.

Everything here is asynchronous on the caller's stream but for :meth:`Engine.wait_prepared`.
"""

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cupy
import numpy as np
import torch
from cupy.cuda import runtime

from .. import native
from ..topology import Topology
from . import abi
from .memory import AllGather, DeviceBlock, PinnedBlock, SharedBlock
from .requirements import debug_delay_ns
from .scaleout import ScaleOut
from .two_hop import Hops


@dataclass(frozen=True)
class Shape:
    """What a buffer was made for: ranks R, experts E, choices K."""

    topology: Topology
    num_experts: int
    num_topk: int

    @property
    def rank(self) -> int:
        """This rank."""
        return self.topology.rank

    @property
    def num_ranks(self) -> int:
        """R."""
        return self.topology.num_ranks

    @property
    def world_size(self) -> tuple[int, int, int]:
        """What the size of an announcement depends on: N, R, E."""
        return self.topology.num_nodes, self.num_ranks, self.num_experts


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


class Routes:
    """Device arrays a dispatch leaves for the calls that use its routes again.

    Attributes:
        memory: one allocation, int64: 8 bytes per (token, copy) [T, D]; then, int32, rows at every
            rank [R], first row of every local expert and the end [E/R + 1], rows of every local
            expert [E/R], the dispatch's verdict [1].
        topk_idx: global expert ids, int64 [T, K].
        number: of the dispatch.
        layout: as in the protocol's enumerators.
        block: ``epcomm_cuda_routes``.
        hops: with several nodes, what the second hop needs.
    """

    hops: Hops | None = None

    def __init__(
        self, shape: Shape, topk_idx: torch.Tensor, max_dests: int, layout: int, number: int
    ) -> None:
        num_tokens = topk_idx.shape[0]
        R, local = shape.num_ranks, shape.num_experts // shape.num_ranks
        num_counts = R + 2 * local + 2
        self.memory = torch.empty(
            num_tokens * max_dests + (num_counts + 1) // 2,
            dtype=torch.int64,
            device=topk_idx.device,
        )
        self.topk_idx = topk_idx
        self.number = number
        self.layout = layout
        self.num_tokens = num_tokens
        self.max_dests = max_dests
        self._rank = shape.rank
        self._groups = slice(R + local + 1, R + 2 * local + 1)
        dests = self.memory.data_ptr()
        counts = dests + 8 * num_tokens * max_dests
        self.block = abi.structures["routes"](
            topk_idx.data_ptr(),
            dests,
            counts,
            counts + 4 * R,
            counts + 4 * self._groups.start,
            counts + 4 * self._groups.stop,
            num_tokens,
            max_dests,
        )

    @property
    def dest_ranks(self) -> torch.Tensor:
        """Rank of every copy, or -1, int16 [T, D]."""
        dests = self.memory[: self.num_tokens * self.max_dests].view(torch.int16)
        return dests.view(self.num_tokens, self.max_dests, 4)[..., 0]

    @property
    def _counts(self) -> torch.Tensor:
        return self.memory[self.num_tokens * self.max_dests :].view(torch.int32)

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        """Rows of every local expert without padding, int32 [E/R], on the device."""
        return self._counts[self._groups]

    def count_rows(self) -> int:
        """Rows of this rank's output (waits for the device)."""
        return int(self._counts[self._rank])


@dataclass
class Agreed:
    """Arguments of a call that all ranks must share; numbers as in the protocol's enumerators."""

    op: int
    format: int
    layout: int
    alignment: int = 1
    with_weights: bool = False
    fixed_rows: int = -1
    wire: int = 0
    handle_number: int = 0


class Engine:
    """Control block, windows and launches of one rank.

    Args:
        shape: sizes.
        allgather: collective exchange of small objects; called here and by ``add_window``.
        max_windows: windows a rank may come to have.
        timeout: seconds a rank may stay silent.
        max_sms: most thread blocks of a call.
        scale_out: the way to other nodes; None in a world of one.
    """

    def __init__(
        self,
        shape: Shape,
        allgather: AllGather,
        *,
        max_windows: int = 64,
        timeout: float = 60.0,
        max_sms: int,
        scale_out: ScaleOut | None = None,
    ) -> None:
        self.shape = shape
        self.scale_out = scale_out
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._allgather = allgather
        self.max_windows = max_windows
        self.number = 0  # of the last call
        abi.check(native.library.epcomm_cuda_load(), "loading the kernels")
        R, E = shape.num_ranks, shape.num_experts
        self._shared: list[SharedBlock] = []
        self._control, controls = self._share(
            native.library.epcomm_cuda_control_bytes(*shape.world_size)
        )
        offset = abi.structures["control"].bad_choice.offset
        self._control.array(offset, (1,), np.int32).fill(2**31 - 1)
        local = E // R
        report_bytes = abi.dtypes["report"].itemsize
        self._report = PinnedBlock(report_bytes + 4 * local)
        self.report = abi.structures["report"].from_address(self._report.pointer)
        self.local_expert_rows = self._report.array(report_bytes, (local,), np.int32)
        self._sequence = abi.structures["sequence"]()
        self._sequence_at = ctypes.addressof(self._sequence)
        abi.check(native.library.epcomm_cuda_sequence_open(self._sequence_at), "making an event")
        self._no_rows = cupy.zeros(R, np.int32)
        self._block_bins = cupy.empty((max_sms, sum(shape.world_size)), np.int32)
        self.windows: list[DeviceBlock] = []
        self.free_windows = 0  # that this rank will announce
        L = shape.topology.ranks_per_node
        self._table = np.zeros((L, max_windows), np.uint64)
        self._device_table = cupy.zeros((L, max_windows), np.uint64)
        runtime.deviceSynchronize()
        world = self._make_world(controls, timeout)
        # Parameter blocks are filled in anew for every call: a launch copies what it needs.
        self._layout = abi.structures["layout"](world=world)
        self._dispatch = abi.structures["dispatch"](world=world)
        self._combine = abi.structures["combine"](world=world)

    def _share(self, num_bytes: int) -> tuple[DeviceBlock, list[int]]:
        """A block on every rank: this rank's, and the node's addresses here.

        Collective over all ranks.
        """
        shared = SharedBlock(
            num_bytes, self.shape.rank, self.shape.topology.node_ranks, self._allgather
        )
        self._shared.append(shared)
        assert shared.block is not None
        return shared.block, shared.addresses

    def _make_world(self, controls: list[int], timeout: float) -> Any:
        world = abi.structures["world"]()
        topology = self.shape.topology
        world.rank = self.shape.rank
        world.num_ranks = self.shape.num_ranks
        world.num_nodes = topology.num_nodes
        world.local_rank = topology.local_rank
        world.num_local = topology.ranks_per_node
        world.node_ranks[: topology.ranks_per_node] = topology.node_ranks
        world.num_experts = self.shape.num_experts
        world.num_topk = self.shape.num_topk
        world.num_windows = self.max_windows
        world.timeout_ns = int(timeout * 1e9)
        world.delay_ns = debug_delay_ns()
        world.controls[: len(controls)] = controls
        world.windows = self._device_table.data.ptr
        world.report = self._report.pointer
        world.block_bins = self._block_bins.data.ptr
        return world

    # Windows --------------------------------------------------------------------------------

    def add_window(self, num_bytes: int) -> int:
        """Give every rank one more window; returns its serial number. Collective.

        Raises:
            MemoryError: there are ``max_windows`` already, or the GPU has no memory left.
            OSError, PeerError: as for SharedBlock.
        """
        serial = len(self.windows)
        if serial == self.max_windows:
            raise MemoryError(
                f"all {serial} windows of this buffer are in use: results of earlier calls keep "
                "them; drop those results, or copy what is needed of them"
            )
        block, self._table[:, serial] = self._share(num_bytes)
        self.windows.append(block)
        self._device_table.set(self._table)
        runtime.deviceSynchronize()
        return serial

    # Streams --------------------------------------------------------------------------------

    def enter(self, stream: int) -> bool:
        """Let ``stream`` wait for the last call; whether it is being captured into a graph."""
        capture = ctypes.c_uint64()
        code = native.library.epcomm_cuda_enter(self._sequence_at, stream, ctypes.byref(capture))
        abi.check(code, "ordering streams")
        return capture.value != 0

    @staticmethod
    def order(first: int, then: int) -> None:
        """Let what comes on stream ``then`` wait for what is on stream ``first`` by now."""
        abi.check(native.library.epcomm_cuda_order(first, then), "ordering streams")

    @staticmethod
    def copy(to: int, source: torch.Tensor, stream: int) -> None:
        """Copy a contiguous tensor to a device address, in order of the stream."""
        nbytes = source.numel() * source.element_size()
        code = native.library.epcomm_cuda_copy(to, source.data_ptr(), nbytes, stream)
        abi.check(code, "copying rows to a window")

    # Launches -------------------------------------------------------------------------------

    def _announce(self, call: Any, agreed: Agreed, num_tokens: int, window: int | None) -> Any:
        """Fill in the announcement. No window: this rank has none that will do, so all grow."""
        announcement = call.announcement
        announcement.op = agreed.op
        announcement.format = agreed.format
        announcement.layout = agreed.layout
        announcement.alignment = agreed.alignment
        announcement.with_weights = agreed.with_weights
        announcement.fixed_rows = agreed.fixed_rows
        announcement.wire = agreed.wire
        announcement.handle_epoch = agreed.handle_number
        announcement.num_tokens = num_tokens
        announcement.window_fd = self.free_windows
        announcement.window_serial = 0 if window is None else window
        announcement.window_bytes = 0 if window is None else self.windows[window].num_bytes
        call.number = self.number
        return announcement

    def _launch(self, name: str, call: Any, stream: int, hops: Hops | None = None) -> None:
        address = ctypes.addressof(call)
        if self.scale_out is not None:
            address = self.scale_out.blocks.extend(name, call, hops)
            name = f"two_hop_{name}"
        function = getattr(native.library, f"epcomm_cuda_launch_{name}")
        abi.check(function(address, self._sequence_at, stream), f"launching {name}")

    def row(self, fmt: int, hidden: int, layout: int, *, topk: bool, weights: bool) -> Any:
        """Describe an output row (``epcomm_cuda_row``)."""
        return abi.structures["row"](
            row_bytes=native.library.epcomm_payload_bytes(fmt, hidden),
            scale_bytes=native.library.epcomm_scale_bytes(fmt, hidden),
            num_topk=self.shape.num_topk,
            layout=layout,
            with_topk=topk,
            with_weights=weights,
        )

    @staticmethod
    @lru_cache(maxsize=256)
    def parts(row: Any, num_rows: int) -> Any:
        """Where the parts of ``num_rows`` rows lie in a window (``epcomm_cuda_parts``).

        ``row`` is one of a buffer's few, which it keeps: results are remembered by its identity.
        """
        parts = abi.structures["parts"]()
        native.library.epcomm_cuda_window_parts(
            ctypes.addressof(row), num_rows, ctypes.addressof(parts)
        )
        return parts

    def max_dests(self, layout: int) -> int:
        """D: copies of a token at most."""
        by_expert = layout == native.constants["LAYOUT_EXPERT"]
        if by_expert or self.scale_out is not None:
            return self.shape.num_topk
        return min(self.shape.num_topk, self.shape.num_ranks)

    def layout(
        self,
        agreed: Agreed,
        row: Any,
        topk_idx: torch.Tensor,
        window: int | None,
        tuning: Tuning,
        stream: int,
    ) -> Routes:
        """Count, announce and place: the first half of a first dispatch, which starts a call."""
        self.number += 1
        routes = Routes(
            self.shape, topk_idx, self.max_dests(agreed.layout), agreed.layout, self.number
        )
        if self.scale_out is not None:
            routes.hops = self.scale_out.make_hops(routes.num_tokens, agreed.layout)
        call = self._layout
        self._announce(call, agreed, routes.num_tokens, window)
        call.row = row
        call.routes = routes.block
        call.num_blocks = tuning.num_sms
        self._launch("layout", call, stream, routes.hops)
        return routes

    def wait_prepared(self, timeout: float) -> int:
        """Wait for the verdict on the last dispatch. Returns 0, 1 (failed) or 2 (too late).

        Raises:
            RuntimeError: the GPU failed.
        """
        code = native.library.epcomm_cuda_wait_prepared(
            self._report.pointer, self.number, int(timeout * 1e9)
        )
        abi.check(max(0, -code), "a call")
        return int(code)

    def dispatch(
        self,
        agreed: Agreed,
        row: Any,
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
        """Move the rows. Pointers are device addresses; ``announce``: cached routes, a new call."""
        self.number += announce
        call = self._dispatch
        self._announce(call, agreed, routes.num_tokens, window)
        call.row = row
        call.routes = routes.block
        call.x = x
        call.scales = scales
        call.topk_weights = topk_weights
        call.row_in_bytes = row_in_bytes
        call.input_format = input_format
        call.announce = announce
        call.num_blocks = tuning.num_sms
        packs = input_format != agreed.format
        call.num_warps = tuning.packing_warps if packs else tuning.dispatch_warps
        call.stages = tuning.dispatch_stages
        self._launch("dispatch", call, stream, routes.hops)

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
        self.number += 1
        call = self._combine
        announcement = self._announce(call, agreed, routes.num_tokens, window)
        announcement.rows_offset = rows_offset
        announcement.row_weights = weights_offset >= 0
        announcement.weights_offset = max(weights_offset, 0)
        announcement.topk_offset = topk_offset
        call.routes = routes.block
        call.bias[0] = bias[0] if bias else 0
        call.bias[1] = bias[1] if len(bias) > 1 else 0
        call.out = out
        call.topk_weights = topk_weights
        call.row_bytes = row_bytes
        call.layout = routes.layout
        call.num_blocks = tuning.num_sms
        call.num_threads = 32 * tuning.combine_warps
        self._launch("combine", call, stream, routes.hops)

    def refuse(self, op: int, reason: str, stream: int) -> None:
        """Take part in a call as the rank whose arguments were refused: nobody moves data."""
        self.number += 1
        combines = op == native.constants["OP_COMBINE"]
        call = abi.structures["combine" if combines else "dispatch"](world=self._dispatch.world)
        announcement = self._announce(call, Agreed(op, 0, 0), 0, None)
        announcement.status = native.constants["STATUS_REFUSED"]
        announcement.reason = reason.encode()[: native.constants["REASON_BYTES"]]
        call.num_blocks = 1
        if combines:
            call.num_threads = 32
            call.routes.max_dests = 1
        else:
            call.num_warps = call.stages = 1
            call.announce = 1
            call.routes.rows = self._no_rows.data.ptr
            call.row_in_bytes = 16
        self._launch("combine" if combines else "dispatch", call, stream)

    # Errors and lifetime --------------------------------------------------------------------

    def announcements(self, epoch: int | None) -> np.ndarray:
        """What every rank announced, structured [R], copied from the device (blocks).

        Args:
            epoch: of the last call; None: of the refused call that the report tells of.
        """
        sizes, R = self.shape.world_size, self.shape.num_ranks
        records = np.zeros(R, native.dtypes["announcement"])
        for rank in range(R):
            if epoch is None:
                offset = native.library.epcomm_cuda_refused_offset(*sizes, rank)
            else:
                offset = native.library.epcomm_cuda_announcement_offset(*sizes, rank, epoch)
            runtime.memcpy(
                records[rank:].ctypes.data,
                self._control.pointer + offset,
                records.itemsize,
                runtime.memcpyDeviceToHost,
            )
        return records

    def times(self, number: int) -> list[int] | None:
        """Moments of call ``number`` (``epcomm_cuda_stamp``), ns; None: too long ago (blocks)."""
        times = abi.structures["times"]()
        slot = number % abi.constants["TIMED_CALLS"]
        offset = abi.structures["control"].times.offset + slot * ctypes.sizeof(times)
        runtime.memcpy(
            ctypes.addressof(times),
            self._control.pointer + offset,
            ctypes.sizeof(times),
            runtime.memcpyDeviceToHost,
        )
        return list(times.at) if times.call == number else None

    def error(self) -> Any:
        """The error record (``epcomm_cuda_error``), or None."""
        return self.report.error if self.report.failed else None

    def close(self) -> None:
        """Unmap and free all but the windows; the ranks must have stopped using the memory."""
        for shared in self._shared:
            shared.unmap()
        self._shared.clear()
        native.library.epcomm_cuda_sequence_close(self._sequence_at)
        self._control.close()
        self._report.close()


assert ctypes.sizeof(ctypes.c_void_p) == 8, "addresses are 64 bits wide"
