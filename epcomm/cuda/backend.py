"""The CUDA back end of a Buffer: rows moved by kernels between the ranks' GPUs."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import cupy
import torch

from ..backend import CombineCall, Config, DispatchCall, Options
from ..bootstrap import Bootstrap, raise_together
from ..cpu.layout import BadChoice
from ..cpu.window import CombineParts, combine_parts
from ..errors import BufferClosedError
from ..formats.wire import WireFormat
from ..native import constants
from ..results import CombineResult, DispatchResult, Handle, Labels
from ..topology import Topology
from ..traffic import LinkTraffic, Traffic
from . import abi
from .device import check_device
from .engine import Agreed, Engine, Routes, Shape, Tuning
from .nics import nic_sms
from .phases import read_phases
from .scaleout import ScaleOut
from .sizes import EXPOSED_WINDOWS, RECEIVE_WINDOWS, window_bytes
from .streams import Calls, CudaEvent
from .verdicts import refusal, timeout
from .windows import Lease, WindowPool

_ROW_DTYPE = {
    WireFormat.F32: torch.float32,
    WireFormat.BF16: torch.bfloat16,
    WireFormat.FP8: torch.float8_e4m3fn,
    WireFormat.FP8_UE8M0: torch.float8_e4m3fn,
}
_FORMAT = {torch.float32: WireFormat.F32, torch.bfloat16: WireFormat.BF16}


@dataclass
class CudaRoutes:
    """What a handle keeps.

    Attributes:
        routes: device arrays.
        max_rows: rows of the fullest rank, or the fixed number; the same on all ranks.
        stream: the routes were written on.
        tokens_per_expert: of the results; None: as the routes have it.
        exposed: where the parts of a combine lie, by dtype.
    """

    routes: Routes
    alignment: int
    fixed_rows: int
    max_rows: int
    stream: torch.cuda.Stream
    tokens_per_expert: torch.Tensor | None
    exposed: dict[torch.dtype, CombineParts] = field(default_factory=dict)


class CudaBackend:
    """Dispatch and combine among GPUs; see epcomm.backend.Backend.

    Calls run on the caller's current stream, or with ``async_op`` on one of the buffer's own.
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
            beside = _check_limits(topology, config, options.fabric)
        except ValueError as caught:
            error = caught
        raise_together(bootstrap, error)
        device = check_device(bootstrap, options.num_sms, config.num_topk, beside)
        self._release_sms = weakref.finalize(self, device.release)
        self.tuning = Tuning(num_sms=device.num_sms)
        self.device = torch.device("cuda", device.index)
        cupy.cuda.Device(device.index).use()
        shape = Shape(topology, config.num_experts, config.num_topk)
        self._scale_out: ScaleOut | None = None
        if topology.num_nodes > 1:
            self._scale_out = ScaleOut(bootstrap, topology, config, options)
        self._engine = Engine(
            shape,
            bootstrap.allgather,
            timeout=options.timeout,
            max_sms=device.max_sms,
            scale_out=self._scale_out,
        )
        self._calls = Calls(self._engine)
        self._receive = WindowPool(self._engine)
        self._expose = WindowPool(self._engine)
        self._rows: dict[tuple[int, int, bool], Any] = {}
        self._closed = False
        self._credit = 0  # cached calls that every rank is known to have a window for

    # Errors -------------------------------------------------------------------------------

    def _begin(self, async_op: bool = False) -> int:
        """Start a call; returns the stream to launch on."""
        if self._closed:
            raise BufferClosedError("the buffer is closed")
        if self._engine.report.failed:
            raise BufferClosedError(
                f"an earlier call failed, make a new Buffer: {timeout(self._engine)}"
            )
        if self._scale_out is not None:
            self._scale_out.fabric.check()
        return self._calls.begin(async_op)

    def _raise_late_refusal(self) -> None:
        """Raise what a call that did not wait for its verdict met since.

        At the end of a call, never instead of one: the peers may not have seen it yet, and would
        wait for this rank.
        """
        report = self._engine.report
        refusals = report.refusals
        if refusals == report.acknowledged or self._calls.capturing:
            return
        verdict, bad = report.refused_verdict, report.refused_choice
        error = self._late_error(verdict, bad)
        report.acknowledged = refusals
        raise error

    def _late_error(self, verdict: int, bad: int) -> Exception:
        if bad >= 0:
            token, choice = divmod(bad, self._config.num_topk)
            return ValueError(
                f"topk_idx: at token {token}, choice {choice} of an earlier dispatch with "
                "fixed_rows, an expert id is out of range or twice in a row; nothing was sent"
            )
        if verdict == abi.constants["FIXED_ROWS"]:
            return ValueError(
                "fixed_rows: too few in an earlier dispatch, nothing was sent: some rank would "
                "have received more rows"
            )
        return refusal(self._engine, verdict)

    def _end_refused(self) -> None:
        """Wait for a refused call to end; it is raised by whoever made it."""
        self._calls.synchronize()
        self._engine.report.acknowledged = self._engine.report.refusals

    def _await_verdict(self) -> int:
        """Wait until the last call has been judged; returns the verdict.

        A combine is judged for the host only where it has no window that will do.
        """
        if self._engine.wait_prepared(self._timeout + 30.0) != 0:
            if self._engine.error() is None:
                raise BufferClosedError(
                    f"a call did not start within {self._timeout + 30.0:.0f} s: the stream's "
                    "earlier work is not done"
                )
            raise timeout(self._engine)
        self._credit = self._engine.report.free_windows
        return int(self._engine.report.verdict)

    # Dispatch -----------------------------------------------------------------------------

    def dispatch(self, call: DispatchCall) -> DispatchResult:
        stream = self._begin(call.async_op)
        if call.handle is not None:
            result = self._cached_dispatch(call, call.handle, stream)
        else:
            # What the call leaves for others is allocated for the stream that writes it.
            with self._calls.on_stream():
                result = self._first_dispatch(call, stream)
        self._raise_late_refusal()
        return result

    def _agreed(self, call: DispatchCall, op: str, handle_number: int = 0) -> Agreed:
        return Agreed(
            op=constants[op],
            format=call.format,
            layout=constants["LAYOUT_EXPERT" if call.layout == "expert" else "LAYOUT_RANK"],
            alignment=call.alignment,
            with_weights=call.topk_weights is not None,
            fixed_rows=-1 if call.fixed_rows is None else call.fixed_rows,
            handle_number=handle_number,
        )

    def _row(self, call: DispatchCall, agreed: Agreed) -> Any:
        key = (call.format, agreed.layout, agreed.with_weights)
        if key not in self._rows:
            fmt, layout, weights = key
            self._rows[key] = self._engine.row(
                fmt, self._config.hidden, layout, topk=True, weights=weights
            )
        return self._rows[key]

    def _first_dispatch(self, call: DispatchCall, stream: int) -> DispatchResult:
        assert call.topk_idx is not None
        engine = self._engine
        topk_idx = call.topk_idx.to(torch.int64)
        agreed = self._agreed(call, "OP_DISPATCH")
        row = self._row(call, agreed)
        # Rows of a fixed number need not be asked for, once there are windows for them.
        needed = 0 if call.fixed_rows is None else engine.parts(row, call.fixed_rows).bytes
        waits = call.fixed_rows is None or self._too_few(needed)
        if waits:
            self._calls.refuse_capture(
                "fixed_rows: a dispatch in a CUDA graph needs it, and one such call before the "
                "capture that makes its windows"
            )
        while True:
            # All ranks agree on too few windows for rows of a fixed number, and make them all now.
            grows = call.fixed_rows is not None and self._too_few(needed)
            lease = None if grows else self._lease(needed, stream, must=not waits)
            window = None if lease is None else lease.serial
            routes = engine.layout(agreed, row, topk_idx, window, self.tuning, stream)
            self._move(call, agreed, row, routes, window, stream)
            if not waits:
                self._credit = max(0, self._credit - 1)
                break
            verdict = self._await_verdict()
            if verdict == abi.constants["OK"]:
                break
            if verdict != abi.constants["GROW"]:
                self._end_refused()
                raise self._first_error(call, routes, verdict)
            del lease
            self._grow(call, row, engine.report.max_rows)
        assert lease is not None
        if call.fixed_rows is None:
            held, max_rows = int(engine.report.rows), int(engine.report.max_rows)
            tokens_per_expert = torch.from_numpy(engine.local_expert_rows.copy())
        else:
            held = max_rows = call.fixed_rows
            tokens_per_expert = None
        state = CudaRoutes(
            routes=routes,
            alignment=call.alignment,
            fixed_rows=agreed.fixed_rows,
            max_rows=max_rows,
            stream=self._calls.stream,
            tokens_per_expert=tokens_per_expert,
        )
        handle = Handle(self.topology, state, routes.num_tokens, held, call.layout)
        self._calls.keep(call.topk_idx)
        return self._result(call, row, lease, handle, state, agreed)

    def _lease(self, needed: int, stream: int, *, must: bool) -> Lease | None:
        """A window to receive into. ``must``: raise where none of this size is free."""
        lease = self._receive.lease(needed, self._calls)
        self._engine.free_windows = self._receive.num_free
        if lease is None and must:
            error = MemoryError(
                "every receive window is held by an earlier result; drop one before a dispatch "
                "with fixed_rows, which does not wait for the peers to make another"
            )
            self._refuse("OP_DISPATCH", error, stream)
            raise error
        return lease

    def _first_error(self, call: DispatchCall, routes: Routes, verdict: int) -> Exception:
        report = self._engine.report
        if report.bad_choice >= 0:
            token, choice = divmod(report.bad_choice, self._config.num_topk)
            topk_idx_TK = routes.topk_idx.cpu().numpy()
            value = topk_idx_TK[token, choice]
            duplicate = bool(0 <= value < self._config.num_experts)
            return BadChoice(token, choice, duplicate).error(topk_idx_TK, self._config.num_experts)
        if verdict == abi.constants["FIXED_ROWS"]:
            return ValueError(
                f"fixed_rows: {call.fixed_rows} is too few, nothing was sent: a rank would "
                f"receive {report.max_rows} rows"
            )
        return refusal(self._engine, verdict, report.epoch)

    def _grow(self, call: DispatchCall, row: Any, max_rows: int) -> None:
        """More windows to receive into, and enough of those to combine from. Collective."""
        held = call.fixed_rows if call.fixed_rows is not None else max_rows
        fixed = call.fixed_rows is not None
        self._grow_receive(
            self._engine.parts(row, held).bytes, all_of_them=fixed or self._receive.largest == 0
        )
        needed = self._exposed(held, torch.bfloat16, call.layout == "expert").nbytes
        if needed > self._expose.largest:
            self._grow_exposed(needed)

    def _too_few(self, needed: int) -> bool:
        """Whether calls that cannot ask for a window may meet none of ``needed`` bytes."""
        return self._receive.count(needed) < RECEIVE_WINDOWS

    def _grow_receive(self, needed: int, *, all_of_them: bool) -> None:
        missing = RECEIVE_WINDOWS - self._receive.count(needed) if all_of_them else 1
        for _ in range(max(1, missing)):
            self._receive.add(window_bytes(needed))

    def _grow_exposed(self, needed: int) -> None:
        for _ in range(EXPOSED_WINDOWS):
            self._expose.add(window_bytes(needed))

    def _exposed(self, rows: int, dtype: torch.dtype, by_expert: bool) -> CombineParts:
        row_bytes = self._config.hidden * dtype.itemsize
        return combine_parts(rows, row_bytes, self._config.num_topk, by_expert)

    def _move(
        self,
        call: DispatchCall,
        agreed: Agreed,
        row: Any,
        routes: Routes,
        window: int | None,
        stream: int,
    ) -> None:
        packed = call.scales is not None
        self._engine.dispatch(
            agreed,
            row,
            routes,
            window,
            self.tuning,
            stream,
            x=call.x.data_ptr(),
            row_in_bytes=self._config.hidden * call.x.element_size(),
            input_format=call.format if packed else _FORMAT[call.x.dtype],
            scales=0 if call.scales is None else call.scales.data_ptr(),
            topk_weights=0 if call.topk_weights is None else call.topk_weights.data_ptr(),
            announce=call.handle is not None,
        )

    def _cached_dispatch(self, call: DispatchCall, handle: Handle, stream: int) -> DispatchResult:
        state: CudaRoutes = handle._state
        self._calls.keep_routes(state.routes, state.stream)
        agreed = self._agreed(call, "OP_CACHED_DISPATCH", state.routes.number)
        row = self._row(call, agreed)
        needed = self._engine.parts(row, state.max_rows).bytes
        fixed = state.fixed_rows >= 0
        while True:
            # All ranks find alike that windows are too small, unless they disagree about the
            # call; so none goes to make larger ones before the verdict says that all will.
            grows = self._too_few(needed) if fixed else needed > self._receive.largest
            lease = None if grows else self._lease(needed, stream, must=fixed)
            if grows:
                self._calls.refuse_capture(
                    "windows are too small for this call; make one like it before the capture"
                )
            window = None if lease is None else lease.serial
            self._move(call, agreed, row, state.routes, window, stream)
            if fixed and not grows:
                self._credit = max(0, self._credit - 1)
                break
            if self._credit > 0 and lease is not None:
                # Every rank had this many windows left, so each has one for this call.
                self._credit -= 1
                break
            self._calls.refuse_capture("handle: only one made with fixed_rows can be captured")
            verdict = self._await_verdict()
            if verdict == abi.constants["OK"]:
                break
            if verdict != abi.constants["GROW"]:
                self._end_refused()
                raise refusal(self._engine, verdict, self._engine.report.epoch)
            self._grow_receive(needed, all_of_them=fixed)
        assert lease is not None
        return self._result(call, row, lease, handle, state, agreed)

    def _result(
        self,
        call: DispatchCall,
        row: Any,
        lease: Lease,
        handle: Handle,
        state: CudaRoutes,
        agreed: Agreed,
    ) -> DispatchResult:
        config, rows = self._config, handle.num_rows
        by_expert = call.layout == "expert"
        parts = self._engine.parts(row, rows)
        words = row.scale_bytes // 4
        scales = None
        if words:
            dtype = torch.float32 if call.format == WireFormat.FP8 else torch.int32
            scales = lease.tensor(parts.scales, (rows, words), dtype)
        weighted = call.topk_weights is not None

        def make_labels() -> Labels:
            topk_idx = weights = None
            if not by_expert:
                topk_idx = lease.tensor(parts.topk_idx, (rows, config.num_topk), torch.int64)
            if weighted:
                shape = (rows,) if by_expert else (rows, config.num_topk)
                weights = lease.tensor(parts.topk_weights, shape, torch.float32)
            source = lease.tensor(parts.source, (rows, 2), torch.int32)
            if tokens_per_expert is None:
                return Labels(topk_idx, weights, source, state.routes.tokens_per_expert)
            return Labels(topk_idx, weights, source, tokens_per_expert.clone())

        self._calls.keep(call.x, call.scales, call.topk_weights)
        tokens_per_expert = state.tokens_per_expert
        row_bytes = row.row_bytes + row.scale_bytes
        number = self._engine.number
        return DispatchResult(
            x=lease.tensor(parts.rows, (rows, config.hidden), _ROW_DTYPE[call.format]),
            scales=scales,
            handle=handle,
            event=CudaEvent(self._calls.stream),
            _make_labels=make_labels,
            _count_rows=(lambda: rows) if state.fixed_rows < 0 else state.routes.count_rows,
            _time_phases=lambda: self._time(number, call.handle is None),
            _count_traffic=lambda: self._count("dispatch", state.routes, row_bytes, agreed),
        )

    # Combine ------------------------------------------------------------------------------

    def combine(self, call: CombineCall) -> CombineResult:
        stream = self._begin(call.async_op)
        if self._scale_out is not None:
            try:
                self._scale_out.check_wire(call.wire)
            except ValueError as error:
                self._refuse("OP_COMBINE", error, stream)
                raise
        state: CudaRoutes = call.handle._state
        x = call.x
        tokens, hidden = state.routes.num_tokens, self._config.hidden
        out = call.out
        if out is None:
            out = torch.empty((tokens, hidden), dtype=x.dtype, device=self.device)
        back = None
        if call.topk_weights is not None:
            shape = (tokens, self._config.num_topk)
            back = torch.empty(shape, dtype=torch.float32, device=self.device)
        self._calls.keep_routes(state.routes, state.stream)
        self._calls.keep(x, out, back, call.weights, call.topk_weights, *call.bias)
        agreed = Agreed(
            op=constants["OP_COMBINE"],
            format=_FORMAT[x.dtype],
            layout=state.routes.layout,
            with_weights=back is not None,
            wire=call.wire,
            handle_number=state.routes.number,
        )
        row_bytes = hidden * x.element_size()
        while True:
            serial, parts = self._expose_rows(call, state, stream)
            self._engine.combine(
                agreed,
                state.routes,
                serial,
                self.tuning,
                stream,
                row_bytes=row_bytes,
                out=out.data_ptr(),
                rows_offset=parts.x,
                weights_offset=-1 if call.weights is None else parts.row_weights,
                topk_offset=parts.topk_weights,
                bias=tuple(b.data_ptr() for b in call.bias),
                topk_weights=0 if back is None else back.data_ptr(),
            )
            if serial is not None:
                break
            self._await_growth(state, x.dtype, call.handle.layout == "expert")
        self._raise_late_refusal()
        number = self._engine.number
        return CombineResult(
            x=out,
            topk_weights=back,
            event=CudaEvent(self._calls.stream),
            _time_phases=lambda: self._time(number, False, combines=True),
            _count_traffic=lambda: self._count("combine", state.routes, row_bytes, agreed),
        )

    def _await_growth(self, state: CudaRoutes, dtype: torch.dtype, by_expert: bool) -> None:
        """After a combine that had no window large enough: make them once all ranks ask so."""
        verdict = self._await_verdict()
        if verdict != abi.constants["GROW"]:
            self._end_refused()
            raise refusal(self._engine, verdict, self._engine.report.epoch)
        self._grow_exposed(self._exposed(state.max_rows, dtype, by_expert).nbytes)

    def _expose_rows(
        self, call: CombineCall, state: CudaRoutes, stream: int
    ) -> tuple[int | None, CombineParts]:
        """Where peers read this rank's rows; copies them unless they are there already.

        The serial is None where windows are too small, on all ranks alike.
        """
        dtype, by_expert = call.x.dtype, call.handle.layout == "expert"
        parts = state.exposed.get(dtype)
        if parts is None:
            parts = self._exposed(call.handle.num_rows, dtype, by_expert)
            state.exposed[dtype] = parts
        # Even no rows need a window to be announced with.
        needed = max(1, self._exposed(state.max_rows, dtype, by_expert).nbytes)
        if needed > self._expose.largest:
            self._calls.refuse_capture(
                "windows are too small for this call; make one like it before the capture"
            )
            return None, parts
        extra = call.weights is not None or call.topk_weights is not None
        place = self._expose.find(call.x)
        if place is None and not extra:
            place = self._receive.find(call.x)
        if place is not None and not (extra and place[1] != 0):
            serial, offset = place
            block_bytes = self._engine.windows[serial].num_bytes
            if not extra or parts.nbytes <= block_bytes:
                parts = CombineParts(offset, parts.row_weights, parts.topk_weights, parts.nbytes)
                self._copy_weights(call, serial, parts, stream)
                return serial, parts
        free = self._expose.borrow(parts.nbytes, self._calls)
        if free is None:
            error = MemoryError(
                "every window to combine from is held by a tensor of combine_input; drop one"
            )
            self._refuse("OP_COMBINE", error, stream)
            raise error
        self._engine.copy(self._engine.windows[free].pointer + parts.x, call.x, stream)
        self._copy_weights(call, free, parts, stream)
        return free, parts

    def _copy_weights(
        self, call: CombineCall, serial: int, parts: CombineParts, stream: int
    ) -> None:
        window = self._engine.windows[serial].pointer
        if call.weights is not None:
            self._engine.copy(window + parts.row_weights, call.weights, stream)
        if call.topk_weights is not None:
            self._engine.copy(window + parts.topk_weights, call.topk_weights, stream)

    def combine_input(self, handle: Handle, dtype: torch.dtype) -> torch.Tensor:
        self._calls.begin(False)
        parts = self._exposed(handle.num_rows, dtype, handle.layout == "expert")
        lease = self._expose.lease(parts.nbytes, self._calls)
        shape = (handle.num_rows, self._config.hidden)
        if lease is None:
            # Not shared, so that combine copies it; a window cannot be made by one rank alone.
            return torch.empty(shape, dtype=dtype, device=self.device)
        return lease.tensor(parts.x, shape, dtype)

    # Refusals, measurements, lifetime -----------------------------------------------------

    def refuse(self, operation: str, error: Exception) -> None:
        self._refuse(f"OP_{operation.upper()}", error, self._begin())

    def _refuse(self, op: str, error: Exception, stream: int) -> None:
        if self._calls.capturing:
            return  # no peer waits: a capture runs nothing
        self._engine.refuse(constants[op], str(error), stream)
        self._end_refused()

    def check(self) -> None:
        self._calls.synchronize()
        if self._engine.error() is not None:
            raise timeout(self._engine)
        self._raise_late_refusal()

    def _time(self, number: int, first: bool, *, combines: bool = False) -> dict[str, float]:
        self._calls.synchronize()
        return read_phases(self._engine, number, first, combines=combines)

    def _count(self, name: str, routes: Routes, row_bytes: int, agreed: Agreed) -> Traffic:
        if self._scale_out is not None:
            assert routes.hops is not None
            return self._scale_out.count(name, routes.dest_ranks, routes.hops, row_bytes, agreed)
        ranks = routes.dest_ranks
        others = int(((ranks >= 0) & (ranks != self.topology.rank)).sum())
        meta = 8 + (4 if ranks.shape[1] == 0 else 12 * self._config.num_topk)
        return Traffic(scale_up=LinkTraffic(others, others * row_bytes, others * meta))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._calls.synchronize()
        self._release_sms()
        if self._scale_out is not None:
            self._scale_out.close()
        if self._engine.error() is not None:
            return  # a rank that lives on may still write here: the memory ends with the process
        self._receive.close()
        self._expose.close()
        self._engine.close()


def _check_limits(topology: Topology, config: Config, fabric: str) -> int:
    """SMs that run beside this rank's calls; raises ValueError for what cannot be."""
    if topology.num_nodes > 1 and fabric == "auto":
        raise ValueError(
            f"ranks_per_node: {topology.num_nodes} nodes; between nodes backend 'cuda' has "
            "fabric='proxy/local' and 'emulated', for virtual nodes of one machine"
        )
    for name, limit in (("num_topk", "MAX_DESTS"), ("num_experts", "MAX_EXPERTS")):
        if abi.available and getattr(config, name) > abi.constants[limit]:
            raise ValueError(
                f"{name}: {getattr(config, name)} exceeds the {abi.constants[limit]} that "
                "backend 'cuda' can do"
            )
    return nic_sms(fabric) if topology.num_nodes > 1 else 0
