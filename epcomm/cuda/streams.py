"""On which streams a buffer's calls run, and what must outlive them there."""

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .. import native
from ..results import Event
from . import abi
from .engine import Engine
from .routes import Routes

#: The current stream's address without making a Stream object, where this torch offers it.
_find_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)
_NOT_READY = 600  # cudaErrorNotReady


class _Events:
    """CUDA events that no result holds, to be recorded again; making one takes a microsecond."""

    def __init__(self) -> None:
        self._idle: list[int] = []
        self._closed = False
        self._close: Any = native.library.epcomm_cuda_event_close

    def take(self) -> int:
        """The address of one."""
        return self._idle.pop() if self._idle else self.make()

    @staticmethod
    def make() -> int:
        """The address of a new one."""
        event = ctypes.c_void_p()
        code = native.library.epcomm_cuda_event_open(ctypes.byref(event))
        abi.check(code, "making an event")
        assert event.value is not None
        return event.value

    def give_back(self, event: int) -> None:
        """Nobody asks for it any more."""
        if self._closed:
            self._close(event)
        else:
            self._idle.append(event)

    def end(self, event: int) -> None:
        """Free one."""
        self._close(event)

    def close(self) -> None:
        """Free them, those of results when these are gone."""
        self._closed = True
        while self._idle:
            self._close(self._idle.pop())


class CudaEvent(Event):
    """When a call has completed on its stream.

    Args:
        address: of the CUDA event.
        give_back: called with it in the end.
    """

    def __init__(self, address: int, give_back: Callable[[int], None]) -> None:
        self.address = address
        self._give_back = give_back

    def wait(self) -> None:
        stream = _find_stream(torch.cuda.current_device())
        code = native.library.epcomm_cuda_event_wait(self.address, stream)
        abi.check(code, "waiting for a call")

    def query(self) -> bool:
        code = native.library.epcomm_cuda_event_query(self.address)
        abi.check(0 if code == _NOT_READY else code, "a call")
        return bool(code == 0)

    def __del__(self) -> None:
        self._give_back(self.address)


class Calls:
    """The stream of the call being made.

    A call runs on the caller's current stream; an asynchronous one on a stream of the buffer's
    own, after what the current stream holds. Calls on different streams wait for each other.

    Attributes:
        stream: of the call.
        address: of that stream.
        caller: the caller's current stream.
        caller_address: of that.
        capturing: whether it is being captured into a CUDA graph.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._index: int = engine.device.index
        self._own = torch.cuda.Stream(engine.device)
        self.stream = self.caller = torch.cuda.current_stream(engine.device)
        self.address = self.caller_address = self.caller.cuda_stream
        self.capturing = False
        self._events = _Events()
        self._give_back = self._events.give_back
        self._event: CudaEvent | None = None

    def find_stream(self, async_op: bool) -> int:
        """Find the stream of a call and let it wait for the last call; returns its address."""
        address: int = _find_stream(self._index)
        if address != self.caller_address:
            self.caller = torch.cuda.current_stream(self._index)
            self.caller_address = address
        self.stream = self.caller
        if async_op:
            self.stream, own = self._own, self._own.cuda_stream
            self._engine.order(address, own)
            address = own
        self.address = address
        self.capturing = self._engine.enter(address)
        return address

    def begin(self, async_op: bool) -> int:
        """As ``find_stream``, for a call that launches kernels and has an event."""
        address = self.find_stream(async_op)
        event = self._events.take()
        self._event = CudaEvent(event, self._give_back)
        self._engine.note_end(event)
        return address

    def event(self) -> CudaEvent:
        """When the kernels launched for this call are done."""
        event = self._event
        assert event is not None
        self._event = None
        if self.capturing:
            # One that a graph holds says nothing outside of it, and is not recorded again.
            event = CudaEvent(self._events.make(), self._events.end)
            code = native.library.epcomm_cuda_event_record(event.address, self.address)
            abi.check(code, "recording an event")
        return event

    def on_stream(self) -> AbstractContextManager[None]:
        """Makes tensors made inside belong to the call's stream."""
        return nullcontext() if self.stream is self.caller else torch.cuda.stream(self.stream)

    def keep(self, *tensors: torch.Tensor | None) -> None:
        """The call uses these, made on the caller's stream: no reuse before it is done."""
        if self.stream is self.caller:
            return
        for tensor in tensors:
            if tensor is not None and tensor.numel():
                tensor.record_stream(self.stream)

    def keep_routes(self, routes: Routes, made_on: int) -> None:
        """As ``keep`` for a handle, made on another call's stream, which has this address."""
        if made_on == self.address:
            return
        hops = () if routes.hops is None else tuple(routes.hops.arrays.values())
        for tensor in (routes.memory, routes.topk_idx, *hops):
            if tensor.numel():
                tensor.record_stream(self.stream)

    def refuse_capture(self, reason: str) -> None:
        """Raise RuntimeError if a CUDA graph is being captured: this call has to wait."""
        if self.capturing:
            raise RuntimeError(f"cannot be captured into a CUDA graph: {reason}")

    def synchronize(self) -> None:
        """Wait for the calls made so far."""
        self.stream.synchronize()

    def close(self) -> None:
        """Free the events that nobody holds."""
        self._event = None
        self._events.close()
