"""Dispatch among GPUs."""

from dataclasses import dataclass, field

import torch

from ..backend import DispatchCall
from ..cpu.layout import BadChoice
from ..cpu.window import CombineParts, combine_parts
from ..results import DispatchResult, Handle, Labels
from ..traffic import Traffic
from . import abi
from .core import Core
from .forms import DispatchForm
from .routes import Routes, RoutesMemory
from .sizes import EXPOSED_WINDOWS, RECEIVE_WINDOWS, window_bytes
from .verdicts import refusal
from .windows import Window


@dataclass
class CudaRoutes:
    """What a handle keeps.

    Attributes:
        routes: device arrays.
        max_rows: rows of the fullest rank, or the fixed number; the same on all ranks.
        stream: address of the one that the routes were written on.
        tokens_per_expert: of the results, int32 [E/R]; None: as the routes have it.
        exposed: where the parts of a combine lie and the bytes of the fullest rank's, by dtype.
    """

    routes: Routes
    alignment: int
    fixed_rows: int
    max_rows: int
    stream: int
    tokens_per_expert: bytes | None
    exposed: dict[torch.dtype, tuple[CombineParts, int]] = field(default_factory=dict)


class _Received:
    """As epcomm.results.Received."""

    __slots__ = ("_core", "_form", "_number", "_rows", "_state", "_window", "_x")

    def __init__(
        self,
        core: Core,
        form: DispatchForm,
        state: CudaRoutes,
        window: Window,
        x: torch.Tensor,
        rows: int,
    ) -> None:
        self._core, self._form, self._state, self._window = core, form, state, window
        self._x = x  # keeps the window lent
        self._rows = rows
        self._number = core.engine.number

    def make_labels(self) -> Labels:
        form, window, state = self._form, self._window, self._state
        rows, num_topk = self._rows, self._core.config.num_topk
        parts = form.parts(rows)
        by_expert = form.by_expert
        topk_idx = weights = None
        if not by_expert:
            topk_idx = window.tensor(parts.topk_idx, (rows, num_topk), torch.int64)
        if form.agreed.with_weights:
            shape = (rows,) if by_expert else (rows, num_topk)
            weights = window.tensor(parts.topk_weights, shape, torch.float32)
        source = window.tensor(parts.source, (rows, 2), torch.int32)
        if state.tokens_per_expert is None:
            return Labels(topk_idx, weights, source, state.routes.tokens_per_expert)
        # A copy of its own, which the caller may write.
        counts = torch.frombuffer(bytearray(state.tokens_per_expert), dtype=torch.int32)
        return Labels(topk_idx, weights, source, counts)

    def count_rows(self) -> int:
        state = self._state
        return self._rows if state.fixed_rows < 0 else state.routes.count_rows()

    def time_phases(self) -> dict[str, float]:
        return self._core.time(self._number, self._form.first)

    def count_traffic(self) -> Traffic:
        form = self._form
        return self._core.count("dispatch", self._state.routes, form.row_bytes, form.agreed)


class Dispatches:
    """Makes dispatches; see epcomm.backend.Backend."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._hidden = core.config.hidden
        self._memory = RoutesMemory()
        # Unwritten routes, by form, tokens and stream; of one call.
        self._ahead: dict[tuple[DispatchForm, int, int], Routes] = {}
        self._enough = 0  # bytes that so many windows are known to have as can be lent at a time

    def dispatch(self, call: DispatchCall) -> DispatchResult:
        """As the back end's."""
        core = self._core
        stream = core.begin(call.async_op)
        if call.handle is not None:
            result = self._cached_dispatch(call, call.handle, stream)
        elif core.calls.stream is core.calls.caller:
            result = self._first_dispatch(call, stream)
        else:
            # What the call leaves for others is allocated for the stream that writes it.
            with core.calls.on_stream():
                result = self._first_dispatch(call, stream)
        core.raise_late_refusal()
        return result

    def _first_dispatch(self, call: DispatchCall, stream: int) -> DispatchResult:
        topk_idx, core, engine = call.topk_idx, self._core, self._core.engine
        assert topk_idx is not None
        if topk_idx.dtype != torch.int64:
            topk_idx = topk_idx.to(torch.int64)
        form = core.forms.of_dispatch(call)
        # Rows of a fixed number need not be asked for, once there are windows for them.
        needed = 0 if call.fixed_rows is None else form.parts(call.fixed_rows).bytes
        waits = call.fixed_rows is None or self._too_few(needed)
        if waits:
            core.calls.refuse_capture(
                "fixed_rows: a dispatch in a CUDA graph needs it, and one such call before the "
                "capture that makes its windows"
            )
        data = _data_of(call)
        routes = self._take_routes(form, topk_idx, stream)
        while True:
            # All ranks agree on too few windows for rows of a fixed number, and make them all now.
            grows = call.fixed_rows is not None and self._too_few(needed)
            window = None if grows else self._borrow(needed, stream, must=not waits)
            serial = None if window is None else window.serial
            engine.dispatch(form, routes, serial, stream, data)
            core.credit.spend(engine.number)
            if not waits:
                break
            # Meanwhile; what the next call is spared is what its caller waits for.
            self._make_ahead(form, topk_idx, stream)
            verdict = core.await_verdict()
            if verdict == abi.constants["OK"]:
                break
            if verdict != abi.constants["GROW"]:
                core.end_refused()
                raise self._first_error(call, routes, verdict)
            self._grow(call, form, engine.report.max_rows)
        assert window is not None
        if call.fixed_rows is None:
            held, max_rows = int(engine.report.rows), int(engine.report.max_rows)
            tokens_per_expert = engine.local_expert_rows.tobytes()
        else:
            held = max_rows = call.fixed_rows
            tokens_per_expert = None
        state = CudaRoutes(
            routes=routes,
            alignment=call.alignment,
            fixed_rows=form.agreed.fixed_rows,
            max_rows=max_rows,
            stream=core.calls.address,
            tokens_per_expert=tokens_per_expert,
        )
        handle = Handle(core.topology, state, routes.num_tokens, held, call.layout)
        core.calls.keep(call.topk_idx)
        return self._result(call, form, window, handle, state)

    def _take_routes(self, form: DispatchForm, topk_idx: torch.Tensor, stream: int) -> Routes:
        """Unwritten ones: those made ahead, if they are for such a call."""
        capturing = self._core.calls.capturing
        routes = None if capturing else self._ahead.pop((form, topk_idx.shape[0], stream), None)
        if routes is None:
            # What a graph writes when it is replayed is its own.
            memory = RoutesMemory(1) if capturing else self._memory
            routes = self._core.engine.make_routes(form, topk_idx, stream, memory)
        routes.use(topk_idx)
        return routes

    def _make_ahead(self, form: DispatchForm, topk_idx: torch.Tensor, stream: int) -> None:
        """Make the routes of the next first dispatch, should it be like this one."""
        key = form, topk_idx.shape[0], stream
        if key not in self._ahead:
            routes = self._core.engine.make_routes(form, topk_idx, stream, self._memory)
            self._ahead = {key: routes}

    def _borrow(self, needed: int, stream: int, *, must: bool) -> Window | None:
        """A window to receive into. ``must``: raise where none of this size is free."""
        core = self._core
        window = core.receive.borrow(needed, core.calls)
        core.engine.free_windows = core.receive.num_left
        if window is None and must:
            error = MemoryError(
                "every receive window is held by an earlier result; drop one before a dispatch "
                "with fixed_rows, which does not wait for the peers to make another"
            )
            core.refuse("OP_DISPATCH", error, stream)
            raise error
        return window

    def _first_error(self, call: DispatchCall, routes: Routes, verdict: int) -> Exception:
        report, config = self._core.engine.report, self._core.config
        if report.bad_choice >= 0:
            token, choice = divmod(report.bad_choice, config.num_topk)
            topk_idx_TK = routes.topk_idx.cpu().numpy()
            value = topk_idx_TK[token, choice]
            duplicate = bool(0 <= value < config.num_experts)
            return BadChoice(token, choice, duplicate).error(topk_idx_TK, config.num_experts)
        if verdict == abi.constants["FIXED_ROWS"]:
            return ValueError(
                f"fixed_rows: {call.fixed_rows} is too few, nothing was sent: a rank would "
                f"receive {report.max_rows} rows"
            )
        return refusal(self._core.engine, verdict, report.epoch)

    def _grow(self, call: DispatchCall, form: DispatchForm, max_rows: int) -> None:
        """More windows to receive into, and enough of those to combine from. Collective."""
        core = self._core
        held = call.fixed_rows if call.fixed_rows is not None else max_rows
        fixed = call.fixed_rows is not None
        self._grow_receive(form.parts(held).bytes, all_of_them=fixed or core.receive.largest == 0)
        row_bytes = self._hidden * torch.bfloat16.itemsize
        by_expert = call.layout == "expert"
        needed = combine_parts(held, row_bytes, core.config.num_topk, by_expert).nbytes
        if needed > core.expose.largest:
            for _ in range(EXPOSED_WINDOWS):
                core.expose.add(window_bytes(needed))

    def _too_few(self, needed: int) -> bool:
        """Whether calls that cannot ask for a window may meet none of ``needed`` bytes."""
        if needed > self._enough and self._core.receive.count(needed) >= RECEIVE_WINDOWS:
            self._enough = needed
        return needed > self._enough

    def _grow_receive(self, needed: int, *, all_of_them: bool) -> None:
        receive = self._core.receive
        missing = RECEIVE_WINDOWS - receive.count(needed) if all_of_them else 1
        for _ in range(max(1, missing)):
            receive.add(window_bytes(needed))

    def _cached_dispatch(self, call: DispatchCall, handle: Handle, stream: int) -> DispatchResult:
        core = self._core
        state: CudaRoutes = handle._state
        core.calls.keep_routes(state.routes, state.stream)
        form = core.forms.of_dispatch(call)
        needed = form.parts(state.max_rows).bytes
        fixed = state.fixed_rows >= 0
        data = _data_of(call)
        while True:
            # All ranks find alike that windows are too small, unless they disagree about the
            # call; so none goes to make larger ones before the verdict says that all will.
            grows = self._too_few(needed) if fixed else needed > core.receive.largest
            window = None if grows else self._borrow(needed, stream, must=fixed)
            if grows:
                core.calls.refuse_capture(
                    "windows are too small for this call; make one like it before the capture"
                )
            serial = None if window is None else window.serial
            covered = core.credit.spend(core.engine.number + 1)
            core.engine.dispatch_again(form, state.routes, serial, stream, data)
            if window is not None and (covered or fixed):
                break
            core.calls.refuse_capture("handle: only one made with fixed_rows can be captured")
            verdict = core.await_verdict() if window is None else core.await_window()
            if verdict == abi.constants["OK"]:
                break
            if verdict != abi.constants["GROW"]:
                core.end_refused()
                raise refusal(core.engine, verdict, core.engine.report.epoch)
            self._grow_receive(needed, all_of_them=fixed)
        assert window is not None
        return self._result(call, form, window, handle, state)

    def _result(
        self,
        call: DispatchCall,
        form: DispatchForm,
        window: Window,
        handle: Handle,
        state: CudaRoutes,
    ) -> DispatchResult:
        calls, rows = self._core.calls, handle.num_rows
        parts = form.parts(rows)
        x = window.lend(parts.rows, (rows, self._hidden), form.x_dtype, calls.caller_address)
        scales = None
        if form.scale_words:
            scales = window.tensor(parts.scales, (rows, form.scale_words), form.scales_dtype)
        calls.keep(call.x, call.scales, call.topk_weights)
        received = _Received(self._core, form, state, window, x, rows)
        return DispatchResult(calls.event(), received, x, scales, handle)


def _data_of(call: DispatchCall) -> tuple[int, int, int]:
    """What the kernel moves, as Engine takes it."""
    scales, weights = call.scales, call.topk_weights
    return (
        call.x.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        0 if weights is None else weights.data_ptr(),
    )
