"""On which streams a buffer's calls run, and what must outlive them there."""

from contextlib import AbstractContextManager, nullcontext

import torch

from ..results import Event
from .engine import Engine, Routes

#: The current stream's address without making a Stream object, where this torch offers it.
_find_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)


class CudaEvent(Event):
    """When a call has completed on its stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def query(self) -> bool:
        return self._event.query()


class Calls:
    """The stream of the call being made.

    A call runs on the caller's current stream; an asynchronous one on a stream of the buffer's
    own, after what the current stream holds. Calls on different streams wait for each other.

    Attributes:
        stream: of the call.
        caller: the caller's current stream.
        capturing: whether it is being captured into a CUDA graph.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._index: int = engine.device.index
        self._own = torch.cuda.Stream(engine.device)
        self.stream = self.caller = torch.cuda.current_stream(engine.device)
        self._caller_address: int = self.caller.cuda_stream
        self.capturing = False

    def begin(self, async_op: bool) -> int:
        """Start a call; returns its stream's address."""
        address: int = _find_stream(self._index)
        if address != self._caller_address:
            self.caller = torch.cuda.current_stream(self._index)
            self._caller_address = address
        self.stream = self.caller
        if async_op:
            self.stream, own = self._own, self._own.cuda_stream
            self._engine.order(address, own)
            address = own
        self.capturing = self._engine.enter(address)
        return address

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

    def keep_routes(self, routes: Routes, made_on: torch.cuda.Stream) -> None:
        """As ``keep`` for a handle, made on another call's stream."""
        if made_on == self.stream:
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
