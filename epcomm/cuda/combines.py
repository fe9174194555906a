"""Combine among GPUs."""

import torch

from ..backend import CombineCall
from ..cpu.window import CombineParts, combine_parts
from ..results import CombineResult, Handle
from ..traffic import Traffic
from . import abi
from .core import Core
from .dispatches import CudaRoutes
from .forms import CombineForm
from .routes import Routes
from .sizes import EXPOSED_WINDOWS, window_bytes
from .verdicts import refusal


class _Combined:
    """As epcomm.results.Finished."""

    __slots__ = ("_core", "_form", "_number", "_routes")

    def __init__(self, core: Core, form: CombineForm, routes: Routes) -> None:
        self._core, self._form, self._routes = core, form, routes
        self._number = core.engine.number

    def time_phases(self) -> dict[str, float]:
        return self._core.time(self._number, False, combines=True)

    def count_traffic(self) -> Traffic:
        form = self._form
        return self._core.count("combine", self._routes, form.row_bytes, form.agreed)


class Combines:
    """Makes combines; see epcomm.backend.Backend.

    Args:
        core: of the buffer.
        device: of its tensors.
    """

    def __init__(self, core: Core, device: torch.device) -> None:
        self._core, self._device = core, device

    def combine(self, call: CombineCall) -> CombineResult:
        """As the back end's."""
        core, config = self._core, self._core.config
        stream = core.begin(call.async_op)
        state: CudaRoutes = call.handle._state
        routes, x, out = state.routes, call.x, call.out
        if out is None:
            shape = (routes.num_tokens, config.hidden)
            out = torch.empty(shape, dtype=x.dtype, device=self._device)
        back = None
        if call.topk_weights is not None:
            shape = (routes.num_tokens, config.num_topk)
            back = torch.empty(shape, dtype=torch.float32, device=self._device)
        core.calls.keep_routes(routes, state.stream)
        core.calls.keep(x, out, back, call.weights, call.topk_weights, *call.bias)
        form = core.forms.of_combine(call)
        while True:
            serial, offset, parts = self._expose_rows(call, state, stream)
            core.engine.combine(
                form,
                routes,
                serial,
                stream,
                out=out.data_ptr(),
                rows_offset=offset,
                weights_offset=-1 if call.weights is None else parts.row_weights,
                topk_offset=parts.topk_weights,
                bias=tuple([b.data_ptr() for b in call.bias]) if call.bias else (),
                topk_weights=0 if back is None else back.data_ptr(),
            )
            if serial is not None:
                break
            self._await_growth(state, x.dtype)
        core.raise_late_refusal()
        return CombineResult(core.calls.event(), _Combined(core, form, routes), out, back)

    def combine_input(self, handle: Handle, dtype: torch.dtype) -> torch.Tensor:
        """As the back end's."""
        core = self._core
        core.calls.find_stream(False)
        parts, _ = self._parts(handle._state, handle.num_rows, dtype)
        shape = (handle.num_rows, core.config.hidden)
        window = core.expose.borrow(parts.nbytes, core.calls)
        if window is None:
            # Not shared, so that combine copies it; a window cannot be made by one rank alone.
            return torch.empty(shape, dtype=dtype, device=self._device)
        return window.lend(parts.x, shape, dtype, core.calls.caller_address)

    def _await_growth(self, state: CudaRoutes, dtype: torch.dtype) -> None:
        """After a combine that had no window large enough: make them once all ranks ask so."""
        core = self._core
        verdict = core.await_verdict()
        if verdict != abi.constants["GROW"]:
            core.end_refused()
            raise refusal(core.engine, verdict, core.engine.report.epoch)
        needed = state.exposed[dtype][1]
        for _ in range(EXPOSED_WINDOWS):
            core.expose.add(window_bytes(needed))

    def _parts(
        self, state: CudaRoutes, num_rows: int, dtype: torch.dtype
    ) -> tuple[CombineParts, int]:
        """Where this rank's parts lie in a window, and what the fullest rank's take."""
        found = state.exposed.get(dtype)
        if found is None:
            config, by_expert = self._core.config, state.routes.by_expert
            row_bytes = config.hidden * dtype.itemsize
            parts, fullest = (
                combine_parts(rows, row_bytes, config.num_topk, by_expert)
                for rows in (num_rows, state.max_rows)
            )
            # Even no rows need a window to be announced with.
            found = state.exposed[dtype] = parts, max(1, fullest.nbytes)
        return found

    def _expose_rows(
        self, call: CombineCall, state: CudaRoutes, stream: int
    ) -> tuple[int | None, int, CombineParts]:
        """Where peers read this rank's rows; copies them unless they are there already.

        The window's serial, the offset of the rows there, and where the other parts are. The serial
        is None where windows are too small, on all ranks alike.
        """
        core = self._core
        parts, needed = self._parts(state, call.handle.num_rows, call.x.dtype)
        if needed > core.expose.largest:
            core.calls.refuse_capture(
                "windows are too small for this call; make one like it before the capture"
            )
            return None, 0, parts
        extra = call.weights is not None or call.topk_weights is not None
        place = core.expose.find(call.x)
        if place is None and not extra:
            place = core.receive.find(call.x)
        if place is not None:
            window, offset = place
            if not extra:
                return window.serial, offset, parts
            if offset == 0 and parts.nbytes <= window.nbytes:
                self._copy_weights(call, window.pointer, parts, stream)
                return window.serial, 0, parts
        free = core.expose.borrow(parts.nbytes, core.calls)
        if free is None:
            error = MemoryError(
                "every window to combine from is held by a tensor of combine_input; drop one"
            )
            core.refuse("OP_COMBINE", error, stream)
            raise error
        core.engine.copy(free.pointer + parts.x, call.x, stream)
        self._copy_weights(call, free.pointer, parts, stream)
        return free.serial, parts.x, parts

    def _copy_weights(
        self, call: CombineCall, window: int, parts: CombineParts, stream: int
    ) -> None:
        copy = self._core.engine.copy
        if call.weights is not None:
            copy(window + parts.row_weights, call.weights, stream)
        if call.topk_weights is not None:
            copy(window + parts.topk_weights, call.topk_weights, stream)
