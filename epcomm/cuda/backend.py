"""The CUDA back end of a Buffer: one node, rows moved by kernels between the ranks' GPUs."""

from dataclasses import dataclass
from typing import Any

import cupy
import torch

from .. import native
from ..backend import CombineCall, Config, DispatchCall, Options
from ..bootstrap import Bootstrap, raise_together
from ..cpu.layout import BadChoice
from ..cpu.window import CombineParts, combine_parts
from ..errors import BufferClosedError
from ..formats.wire import WireFormat
from ..native import constants
from ..results import CombineResult, DispatchResult, Event, Handle
from ..topology import Topology
from ..traffic import LinkTraffic, Traffic
from . import abi
from .device import check_device
from .engine import Agreed, Engine, Routes, Shape, Tuning
from .verdicts import refusal, timeout
from .windows import Lease, WindowPool

_ROW_DTYPE = {
    WireFormat.F32: torch.float32,
    WireFormat.BF16: torch.bfloat16,
    WireFormat.FP8: torch.float8_e4m3fn,
    WireFormat.FP8_UE8M0: torch.float8_e4m3fn,
}
_FORMAT = {torch.float32: WireFormat.F32, torch.bfloat16: WireFormat.BF16}
#: Windows are a multiple of this, and grow by a quarter beyond what was asked for.
_WINDOW_STEP = 2 << 20


class CudaEvent(Event):
    """When a call on the buffer's stream has completed."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def query(self) -> bool:
        return self._event.query()


@dataclass
class CudaRoutes:
    """What a handle keeps.

    Attributes:
        routes: device arrays.
        max_rows: rows of the fullest rank; the same on all ranks.
        num_rows: rows of this rank's output in use.
        tokens_per_expert: int32 [E/R], host.
    """

    routes: Routes
    alignment: int
    fixed_rows: int
    max_rows: int
    num_rows: int
    tokens_per_expert: torch.Tensor


class CudaBackend:
    """Dispatch and combine among the GPUs of a node; see epcomm.backend.Backend.

    Calls run on a stream of the buffer's own, after what the caller's current stream holds.
    """

    def __init__(
        self, bootstrap: Bootstrap, topology: Topology, config: Config, options: Options
    ) -> None:
        self.topology = topology
        self._config = config
        self._timeout = options.timeout
        self._bootstrap = bootstrap
        error: Exception | None = None
        try:
            _check_limits(topology, config)
        except ValueError as caught:
            error = caught
        raise_together(bootstrap, error)
        device = check_device(bootstrap, options.num_sms)
        self.tuning = Tuning(num_sms=device.num_sms)
        self.device = torch.device("cuda", device.index)
        cupy.cuda.Device(device.index).use()
        shape = Shape(topology.rank, topology.num_ranks, config.num_experts, config.num_topk)
        self._engine = Engine(
            shape, bootstrap.allgather, timeout=options.timeout, max_sms=device.max_sms
        )
        self._stream = torch.cuda.Stream(self.device)
        self._receive = WindowPool(self._engine)
        self._expose = WindowPool(self._engine)
        self._rows: dict[tuple[int, int, bool], Any] = {}
        self._closed = False
        self._seen_refusal = 0
        self._credit = 0  # cached calls that every rank is known to have a window for

    # Streams ------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._closed:
            raise BufferClosedError("the buffer is closed")
        if self._engine.error() is not None:
            raise BufferClosedError(
                f"an earlier call failed, make a new Buffer: {timeout(self._engine)}"
            )
        self._raise_late_refusal()
        current = torch.cuda.current_stream().cuda_stream
        abi.check(
            native.library.epcomm_cuda_order(current, self._stream.cuda_stream), "ordering streams"
        )

    def _raise_late_refusal(self) -> None:
        """Raise what a call that did not wait for its verdict met since."""
        epoch = int(self._engine.report["refused"])
        if epoch > self._seen_refusal:
            self._seen_refusal = epoch
            raise refusal(self._engine, epoch, int(self._engine.report["refused_verdict"]))

    def _keep(self, *tensors: torch.Tensor | None) -> None:
        """The buffer's stream uses these: their memory must not be reused before it has."""
        for tensor in tensors:
            if tensor is not None and tensor.numel():
                tensor.record_stream(self._stream)

    # Dispatch -----------------------------------------------------------------------------

    def dispatch(self, call: DispatchCall) -> DispatchResult:
        self._begin()
        if call.handle is not None:
            return self._cached_dispatch(call, call.handle)
        # The routes are the buffer's stream's own: it alone uses them, call after call.
        with torch.cuda.stream(self._stream):
            return self._first_dispatch(call)

    def _agreed(self, call: DispatchCall, op: str, handle_epoch: int = 0) -> Agreed:
        by_expert = call.layout == "expert"
        return Agreed(
            op=constants[op],
            format=call.format,
            layout=constants["LAYOUT_EXPERT" if by_expert else "LAYOUT_RANK"],
            alignment=call.alignment,
            with_weights=call.topk_weights is not None,
            fixed_rows=-1 if call.fixed_rows is None else call.fixed_rows,
            handle_epoch=handle_epoch,
        )

    def _row(self, call: DispatchCall, agreed: Agreed) -> Any:
        key = (call.format, agreed.layout, agreed.with_weights)
        if key not in self._rows:
            fmt, layout, weights = key
            self._rows[key] = self._engine.row(
                fmt, self._config.hidden, layout, topk=True, weights=weights
            )
        return self._rows[key]

    def _first_dispatch(self, call: DispatchCall) -> DispatchResult:
        assert call.topk_idx is not None
        engine = self._engine
        topk_idx = call.topk_idx.to(torch.int64)
        agreed = self._agreed(call, "OP_DISPATCH")
        row = self._row(call, agreed)
        while True:
            lease = self._receive.lease()
            engine.free_windows = self._receive.num_free
            routes = engine.make_routes(topk_idx, agreed.layout)
            window = None if lease is None else lease.serial
            engine.layout(agreed, row, routes, window, self.tuning, self._stream.cuda_stream)
            self._move(call, agreed, row, routes, window)
            self._await_counts(routes.epoch)
            verdict = int(engine.report["verdict"])
            self._credit = int(engine.report["free_windows"])
            if verdict != abi.constants["GROW"]:
                break
            self._stream.synchronize()
            self._seen_refusal = routes.epoch
            del lease
            self._grow(call, row, int(engine.report["max_rows"]))
        if verdict != abi.constants["OK"]:
            self._stream.synchronize()
            self._seen_refusal = routes.epoch
            raise self._first_error(call, routes, verdict)
        assert lease is not None
        num_rows = int(engine.report["rows"])
        state = CudaRoutes(
            routes=routes,
            alignment=call.alignment,
            fixed_rows=agreed.fixed_rows,
            max_rows=int(engine.report["max_rows"]),
            num_rows=num_rows,
            tokens_per_expert=torch.from_numpy(engine.local_expert_rows.copy()),
        )
        held = num_rows if call.fixed_rows is None else call.fixed_rows
        handle = Handle(self.topology, state, routes.num_tokens, held, call.layout)
        self._keep(call.topk_idx)
        return self._result(call, row, lease, handle, state)

    def _await_counts(self, epoch: int) -> None:
        if self._engine.wait_prepared(epoch, self._timeout + 30.0) != 0:
            if self._engine.error() is None:
                raise BufferClosedError(
                    f"call {epoch} did not start within {self._timeout + 30.0:.0f} s: the stream's "
                    "earlier work is not done"
                )
            raise timeout(self._engine)

    def _first_error(self, call: DispatchCall, routes: Routes, verdict: int) -> Exception:
        bad = int(self._engine.report["bad_choice"])
        if bad >= 0:
            token, choice = divmod(bad, self._config.num_topk)
            topk_idx_TK = routes.topk_idx.cpu().numpy()
            value = topk_idx_TK[token, choice]
            duplicate = bool(0 <= value < self._config.num_experts)
            return BadChoice(token, choice, duplicate).error(topk_idx_TK, self._config.num_experts)
        if verdict == abi.constants["FIXED_ROWS"]:
            return ValueError(
                f"fixed_rows: {call.fixed_rows} is too few, nothing was sent: a rank would "
                f"receive {int(self._engine.report['max_rows'])} rows"
            )
        return refusal(self._engine, routes.epoch, verdict)

    def _grow(self, call: DispatchCall, row: Any, max_rows: int) -> None:
        """One more window to receive into, and enough of those to combine from. Collective."""
        held = max_rows if call.fixed_rows is None else max(max_rows, call.fixed_rows)
        # The first time, some to spare: calls overlap, and a cached one cannot always ask.
        for _ in range(3 if self._receive.largest == 0 else 1):
            self._receive.add(_window_bytes(int(self._engine.parts(row, held)["bytes"])))
        self._provide(held, torch.bfloat16, call.layout == "expert")

    def _provide(self, max_rows: int, dtype: torch.dtype, by_expert: bool) -> None:
        """Make sure that windows to combine from are large enough. Collective, or nothing."""
        needed = max(1, self._exposed(max_rows, dtype, by_expert).nbytes)
        if needed > self._expose.largest:
            for _ in range(2):
                self._expose.add(_window_bytes(needed))

    def _exposed(self, rows: int, dtype: torch.dtype, by_expert: bool) -> CombineParts:
        row_bytes = self._config.hidden * dtype.itemsize
        return combine_parts(rows, row_bytes, self._config.num_topk, by_expert)

    def _move(
        self, call: DispatchCall, agreed: Agreed, row: Any, routes: Routes, window: int | None
    ) -> None:
        packed = call.scales is not None
        self._engine.dispatch(
            agreed,
            row,
            routes,
            window,
            self.tuning,
            self._stream.cuda_stream,
            x=call.x.data_ptr(),
            row_in_bytes=self._config.hidden * call.x.element_size(),
            input_format=call.format if packed else _FORMAT[call.x.dtype],
            scales=0 if call.scales is None else call.scales.data_ptr(),
            topk_weights=0 if call.topk_weights is None else call.topk_weights.data_ptr(),
            announce=call.handle is not None,
        )

    def _cached_dispatch(self, call: DispatchCall, handle: Handle) -> DispatchResult:
        state: CudaRoutes = handle._state
        agreed = self._agreed(call, "OP_CACHED_DISPATCH", state.routes.epoch)
        row = self._row(call, agreed)
        held = max(state.max_rows, state.fixed_rows)
        needed = int(self._engine.parts(row, held)["bytes"])
        if needed > self._receive.largest:
            self._receive.add(_window_bytes(needed))
            self._credit = 0
        while True:
            lease = self._receive.lease(needed)
            self._engine.free_windows = self._receive.num_free
            if lease is None and state.fixed_rows >= 0:
                error = MemoryError(
                    "every receive window is held by an earlier result; drop one before a cached "
                    "dispatch with fixed_rows, which does not wait for the peers to make another"
                )
                self.refuse("dispatch", error)
                raise error
            self._move(call, agreed, row, state.routes, None if lease is None else lease.serial)
            if state.fixed_rows >= 0:
                break
            if self._credit > 0:
                # Every rank had this many windows left, so each has one for this call.
                self._credit -= 1
                break
            epoch = self._engine.epoch
            self._await_counts(epoch)
            verdict = int(self._engine.report["verdict"])
            self._credit = int(self._engine.report["free_windows"])
            if verdict == abi.constants["OK"]:
                break
            self._seen_refusal = epoch
            self._stream.synchronize()
            if verdict != abi.constants["GROW"]:
                raise refusal(self._engine, epoch, verdict)
            self._receive.add(_window_bytes(needed))
        assert lease is not None
        return self._result(call, row, lease, handle, state)

    def _result(
        self, call: DispatchCall, row: Any, lease: Lease, handle: Handle, state: CudaRoutes
    ) -> DispatchResult:
        config, rows = self._config, handle.num_rows
        by_expert = call.layout == "expert"
        laid_out = self._engine.parts(row, rows)
        parts = dict(zip(laid_out.dtype.names or (), laid_out.item(), strict=True))
        words = int(row["scale_bytes"]) // 4
        scales = None
        if words:
            dtype = torch.float32 if call.format == WireFormat.FP8 else torch.int32
            scales = lease.tensor(parts["scales"], (rows, words), dtype)
        topk_idx = weights = None
        if not by_expert:
            topk_idx = lease.tensor(parts["topk_idx"], (rows, config.num_topk), torch.int64)
        if call.topk_weights is not None:
            shape = (rows,) if by_expert else (rows, config.num_topk)
            weights = lease.tensor(parts["topk_weights"], shape, torch.float32)
        self._keep(call.x, call.scales, call.topk_weights)
        row_bytes = int(row["row_bytes"]) + int(row["scale_bytes"])
        return DispatchResult(
            x=lease.tensor(parts["rows"], (rows, config.hidden), _ROW_DTYPE[call.format]),
            scales=scales,
            topk_idx=topk_idx,
            topk_weights=weights,
            source=lease.tensor(parts["source"], (rows, 2), torch.int32),
            tokens_per_expert=state.tokens_per_expert.clone(),
            num_rows=state.num_rows,
            handle=handle,
            event=CudaEvent(self._stream),
            phases={},
            _count_traffic=lambda: self._count(state.routes, row_bytes),
        )

    # Combine ------------------------------------------------------------------------------

    def combine(self, call: CombineCall) -> CombineResult:
        self._begin()
        state: CudaRoutes = call.handle._state
        by_expert = call.handle.layout == "expert"
        x, rows = call.x, call.handle.num_rows
        self._provide(max(state.max_rows, state.fixed_rows), x.dtype, by_expert)
        serial, parts = self._expose_rows(call, rows, by_expert)
        tokens, hidden = state.routes.num_tokens, self._config.hidden
        out = call.out
        if out is None:
            out = torch.empty((tokens, hidden), dtype=x.dtype, device=self.device)
        back = None
        if call.topk_weights is not None:
            shape = (tokens, self._config.num_topk)
            back = torch.empty(shape, dtype=torch.float32, device=self.device)
        agreed = Agreed(
            op=constants["OP_COMBINE"],
            format=_FORMAT[x.dtype],
            layout=state.routes.layout,
            with_weights=back is not None,
            wire=call.wire,
            handle_epoch=state.routes.epoch,
        )
        self._engine.combine(
            agreed,
            state.routes,
            serial,
            self.tuning,
            self._stream.cuda_stream,
            row_bytes=hidden * x.element_size(),
            out=out.data_ptr(),
            rows_offset=parts.x,
            weights_offset=-1 if call.weights is None else parts.row_weights,
            topk_offset=parts.topk_weights,
            bias=tuple(b.data_ptr() for b in call.bias),
            topk_weights=0 if back is None else back.data_ptr(),
        )
        self._keep(x, out, back, call.weights, call.topk_weights, *call.bias)
        row_bytes = hidden * x.element_size()
        return CombineResult(
            x=out,
            topk_weights=back,
            event=CudaEvent(self._stream),
            phases={},
            _count_traffic=lambda: self._count(state.routes, row_bytes),
        )

    def _expose_rows(
        self, call: CombineCall, rows: int, by_expert: bool
    ) -> tuple[int, CombineParts]:
        """Where peers read this rank's rows; copies them unless they are there already."""
        parts = self._exposed(rows, call.x.dtype, by_expert)
        extra = call.weights is not None or call.topk_weights is not None
        place = self._expose.find(call.x)
        if place is None and not extra:
            place = self._receive.find(call.x)
        if place is not None and not (extra and place[1] != 0):
            serial, offset = place
            block_bytes = self._engine.windows[serial].num_bytes
            if not extra or parts.nbytes <= block_bytes:
                parts = CombineParts(offset, parts.row_weights, parts.topk_weights, parts.nbytes)
                if extra:
                    with torch.cuda.stream(self._stream):
                        self._copy_weights(call, Lease(self._engine, serial), parts)
                return serial, parts
        free = self._expose.lease(parts.nbytes)
        if free is None:
            error = MemoryError(
                "every window to combine from is held by a tensor of combine_input; drop one"
            )
            self.refuse("combine", error)
            raise error
        with torch.cuda.stream(self._stream):
            free.tensor(parts.x, tuple(call.x.shape), call.x.dtype).copy_(call.x)
            self._copy_weights(call, free, parts)
        # The lease may end here: the next user of the window is later on the same stream.
        return free.serial, parts

    def _copy_weights(self, call: CombineCall, lease: Lease, parts: CombineParts) -> None:
        if call.weights is not None:
            shape = tuple(call.weights.shape)
            lease.tensor(parts.row_weights, shape, torch.float32).copy_(call.weights)
        if call.topk_weights is not None:
            shape = tuple(call.topk_weights.shape)
            lease.tensor(parts.topk_weights, shape, torch.float32).copy_(call.topk_weights)

    def combine_input(self, handle: Handle, dtype: torch.dtype) -> torch.Tensor:
        parts = self._exposed(handle.num_rows, dtype, handle.layout == "expert")
        lease = self._expose.lease(parts.nbytes)
        shape = (handle.num_rows, self._config.hidden)
        if lease is None:
            # Not shared, so that combine copies it; a window cannot be made by one rank alone.
            return torch.empty(shape, dtype=dtype, device=self.device)
        return lease.tensor(parts.x, shape, dtype)

    # Refusals, traffic, lifetime ----------------------------------------------------------

    def refuse(self, operation: str, error: Exception) -> None:
        self._begin()
        op = constants[f"OP_{operation.upper()}"]
        self._engine.refuse(op, str(error), self._stream.cuda_stream)
        self._seen_refusal = self._engine.epoch

    def check(self) -> None:
        """Wait for all calls made so far and raise what went wrong in them.

        A combine returns before its peers have answered, so what it meets is raised here or by
        the next call.

        Raises:
            PeerError, MismatchError: a combine was refused by another rank.
            PeerTimeoutError: a rank stayed silent.
        """
        self._stream.synchronize()
        if self._engine.error() is not None:
            raise timeout(self._engine)
        self._raise_late_refusal()

    def _count(self, routes: Routes, row_bytes: int) -> Traffic:
        ranks = routes.dests.view(torch.int16).view(routes.num_tokens, -1, 4)[..., 0]
        others = int(((ranks >= 0) & (ranks != self.topology.rank)).sum())
        meta = 8 + (4 if ranks.shape[1] == 0 else 12 * self._config.num_topk)
        return Traffic(scale_up=LinkTraffic(others, others * row_bytes, others * meta))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._stream.synchronize()
        if self._engine.error() is not None:
            return  # a rank that lives on may still write here: the memory ends with the process
        self._receive.close()
        self._expose.close()
        self._engine.close()


def _window_bytes(needed: int) -> int:
    return max(1, -(-(needed + needed // 4) // _WINDOW_STEP)) * _WINDOW_STEP


def _check_limits(topology: Topology, config: Config) -> None:
    if topology.num_nodes != 1:
        raise ValueError(
            f"backend 'cuda': {topology.num_nodes} nodes; it works inside one node only"
        )
    if not abi.available:
        return
    for name, limit in (("num_topk", "MAX_DESTS"), ("num_experts", "MAX_EXPERTS")):
        if getattr(config, name) > abi.constants[limit]:
            raise ValueError(
                f"{name}: {getattr(config, name)} exceeds the {abi.constants[limit]} that "
                "backend 'cuda' can do"
            )
