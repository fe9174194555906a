"""One rank's CUDA state: control blocks, windows, and the launches of the kernels.

Everything here is asynchronous on the caller's stream but for :meth:`Engine.wait_prepared`.
"""

import ctypes
from typing import Any

import cupy
import numpy as np
import torch
from cupy.cuda import runtime

from .. import native
from . import abi
from .forms import Agreed, Block, CombineForm, DispatchForm
from .memory import AllGather, DeviceBlock, PinnedBlock, SharedBlock
from .requirements import debug_delay_ns
from .routes import Routes, RoutesMemory, Shape
from .scaleout import ScaleOut
from .two_hop import Hops

_LAUNCH: dict[str, Any] = {
    name: getattr(native.library, f"epcomm_cuda_launch_{name}", None)
    for name in ("dispatch", "combine", "two_hop_layout", "two_hop_dispatch", "two_hop_combine")
}

#: Device addresses: rows, scales and top-k weights, 0 for what there is not.
Data = tuple[int, int, int]


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
        self.free_windows = 0  # that this rank announces
        L = shape.topology.ranks_per_node
        self._table = np.zeros((L, max_windows), np.uint64)
        self._device_table = cupy.zeros((L, max_windows), np.uint64)
        runtime.deviceSynchronize()
        #: ``epcomm_cuda_world``, the same for all calls.
        self.world = self._make_world(controls, timeout)
        self._capture = ctypes.c_uint64()
        self._capture_at = ctypes.addressof(self._capture)
        self._enter: Any = native.library.epcomm_cuda_enter

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
        code = self._enter(self._sequence_at, stream, self._capture_at)
        if code != 0:
            abi.check(code, "ordering streams")
        return self._capture.value != 0

    def note_end(self, event: int) -> None:
        """Record this CUDA event after the kernels launched from now on, but for captured ones."""
        self._sequence.next = event

    @staticmethod
    def order(first: int, then: int) -> None:
        """Let what comes on stream ``then`` wait for what is on stream ``first`` by now."""
        abi.check(native.library.epcomm_cuda_order(first, then), "ordering streams")

    @staticmethod
    def copy(to: int, source: torch.Tensor, stream: int) -> None:
        """Copy a contiguous tensor to a device address, in order of the stream."""
        code = native.library.epcomm_cuda_copy(to, source.data_ptr(), source.nbytes, stream)
        abi.check(code, "copying rows to a window")

    # Launches -------------------------------------------------------------------------------

    def _announce(self, block: Block, window: int | None) -> None:
        """Fill in what each call announces. No window: this rank has none that will do."""
        announcement = block.announcement
        announcement.window_fd = self.free_windows
        if window is None:
            announcement.window_serial = announcement.window_bytes = 0
        else:
            announcement.window_serial = window
            announcement.window_bytes = self.windows[window].num_bytes
        block.call.number = self.number

    def _launch(self, name: str, block: Block, stream: int, hops: Hops | None = None) -> None:
        address = block.address
        if self.scale_out is not None:
            address = self.scale_out.blocks.extend(name, block.call, hops)
            name = f"two_hop_{name}"
        code = _LAUNCH[name](address, self._sequence_at, stream)
        if code != 0:
            abi.check(code, f"launching {name}")

    def make_routes(
        self, form: DispatchForm, like: torch.Tensor, stream: int, memory: RoutesMemory
    ) -> Routes:
        """Unwritten routes for a first dispatch.

        Args:
            form: of the call.
            like: choices of as many tokens, int64 [T, K].
            stream: address of the call's, which is torch's current stream.
            memory: for the routes.
        """
        routes = Routes(self.shape, like, form.max_dests, form.by_expert, memory, stream)
        if self.scale_out is not None:
            routes.hops = self.scale_out.make_hops(routes.num_tokens, form.agreed.layout)
        return routes

    def dispatch(
        self, form: DispatchForm, routes: Routes, window: int | None, stream: int, data: Data
    ) -> None:
        """Count, announce and place, then move the rows: a first dispatch.

        Args:
            form: of the call.
            routes: to write; its choices are known.
            window: to receive into; None: there is none that will do.
            stream: address of the call's.
            data: what to move.
        """
        self.number += 1
        routes.number = self.number
        if form.layout is not None:
            self._announce(form.layout, window)
            form.layout.follow(routes, 0)
            self._launch("layout", form.layout, stream, routes.hops)
        self._move(form, routes, window, stream, data)

    def dispatch_again(
        self,
        form: DispatchForm,
        routes: Routes,
        window: int | None,
        stream: int,
        data: Data,
    ) -> None:
        """Announce and move the rows along routes that are known. Arguments as of dispatch."""
        self.number += 1
        self._move(form, routes, window, stream, data)

    def _move(
        self,
        form: DispatchForm,
        routes: Routes,
        window: int | None,
        stream: int,
        data: Data,
    ) -> None:
        block = form.block
        self._announce(block, window)
        block.follow(routes, 0 if form.first else routes.number)
        call = block.call
        call.x, call.scales, call.topk_weights = data
        self._launch("dispatch", block, stream, routes.hops)

    def wait_prepared(self, number: int, timeout: float) -> int:
        """Wait for the verdict on this call or a later one. Returns 0, 1 (failed), 2 (too late).

        Raises:
            RuntimeError: the GPU failed.
        """
        code: int = native.library.epcomm_cuda_wait_prepared(
            self._report.pointer, number, int(timeout * 1e9)
        )
        if code < 0:
            abi.check(-code, "a call")
        return code

    def combine(
        self,
        form: CombineForm,
        routes: Routes,
        window: int | None,
        stream: int,
        *,
        out: int,
        rows_offset: int = 0,
        weights_offset: int = -1,
        topk_offset: int = 0,
        bias: tuple[int, ...] = (),
        topk_weights: int = 0,
    ) -> None:
        """Sum the rows of every token. ``weights_offset`` < 0: rows carry no weight."""
        self.number += 1
        block = form.block
        self._announce(block, window)
        block.follow(routes, routes.number)
        call = block.call
        places = (rows_offset, weights_offset, topk_offset, bias)
        if places != form.places:
            announcement = block.announcement
            announcement.rows_offset = rows_offset
            announcement.row_weights = weights_offset >= 0
            announcement.weights_offset = max(weights_offset, 0)
            announcement.topk_offset = topk_offset
            call.bias[0] = bias[0] if bias else 0
            call.bias[1] = bias[1] if len(bias) > 1 else 0
            form.places = places
        call.out, call.topk_weights = out, topk_weights
        self._launch("combine", block, stream, routes.hops)

    def refuse(self, op: int, reason: str, stream: int) -> None:
        """Take part in a call as the rank whose arguments were refused: nobody moves data."""
        self.number += 1
        name = "combine" if op == native.constants["OP_COMBINE"] else "dispatch"
        block = Block(name, self.world, Agreed(op, 0, 0), 1)
        self._announce(block, None)
        block.announcement.status = native.constants["STATUS_REFUSED"]
        block.announcement.reason = reason.encode()[: native.constants["REASON_BYTES"]]
        call = block.call
        if name == "combine":
            call.num_threads = 32
            call.routes.max_dests = 1
        else:
            call.num_warps = call.stages = 1
            call.announce = 1
            call.routes.rows = self._no_rows.data.ptr
            call.row_in_bytes = 16
        self._launch(name, block, stream)

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
