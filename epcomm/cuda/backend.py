"""The CUDA back end of a Buffer: rows moved by kernels between the ranks' GPUs."""

import weakref

import cupy
import torch

from ..backend import CombineCall, Config, DispatchCall, Options
from ..bootstrap import Bootstrap, raise_together
from ..results import CombineResult, DispatchResult, Handle
from ..timeline import Trace
from ..topology import Topology
from . import abi
from .combines import Combines
from .core import Core
from .device import Device, check_device
from .dispatches import Dispatches
from .engine import Engine
from .forms import Forms, Tuning
from .nics import nic_sms
from .routes import Shape
from .scaleout import ScaleOut
from .timeline import GpuTimeline


class CudaBackend:
    """Dispatch and combine among GPUs; see epcomm.backend.Backend.

    Calls run on the caller's current stream, or with ``async_op`` on one of the buffer's own.
    """

    def __init__(
        self, bootstrap: Bootstrap, topology: Topology, config: Config, options: Options
    ) -> None:
        self.topology = topology
        error: Exception | None = None
        try:
            beside = _check_limits(topology, config, options.fabric)
        except ValueError as caught:
            error = caught
        raise_together(bootstrap, error)
        device = check_device(bootstrap, options.num_sms, config.num_topk, beside)
        self._release_sms = weakref.finalize(self, device.release)
        self._scale_out: ScaleOut | None = None
        try:
            self._make(bootstrap, config, options, device)
        except BaseException:
            # Whoever keeps the exception keeps this object, and other buffers need the SMs.
            if self._scale_out is not None:
                self._scale_out.close()
            self._release_sms()
            raise

    def _make(self, bootstrap: Bootstrap, config: Config, options: Options, device: Device) -> None:
        """What runs on the GPU. Collective."""
        topology = self.topology
        self.tuning = Tuning(num_sms=device.num_sms, memory_limits=device.memory_limits)
        self.device = torch.device("cuda", device.index)
        cupy.cuda.Device(device.index).use()
        shape = Shape(topology, config.num_experts, config.num_topk)
        if topology.num_nodes > 1:
            self._scale_out = ScaleOut(bootstrap, topology, config, options)
        self._engine = Engine(
            shape,
            bootstrap.allgather,
            timeout=options.timeout,
            max_sms=device.max_sms,
            scale_out=self._scale_out,
        )
        self._timeline: GpuTimeline | None = None
        if options.timeline is not None:
            self._timeline = GpuTimeline(topology, options.timeline, device, self._scale_out)
            self._engine.world.timeline = self._timeline.pointer
        forms = Forms(shape, config.hidden, self._engine.world, self.tuning)
        self._core = Core(topology, config, self._engine, forms, options.timeout)
        self._dispatches = Dispatches(self._core)
        self._combines = Combines(self._core, self.device)

    def dispatch(self, call: DispatchCall) -> DispatchResult:
        return self._dispatches.dispatch(call)

    def combine(self, call: CombineCall) -> CombineResult:
        return self._combines.combine(call)

    def combine_input(self, handle: Handle, dtype: torch.dtype) -> torch.Tensor:
        return self._combines.combine_input(handle, dtype)

    def refuse(self, operation: str, error: Exception) -> None:
        self._core.refuse(f"OP_{operation.upper()}", error, self._core.begin())

    def timeline(self, *, restart: bool) -> Trace:
        assert self._timeline is not None
        self._core.calls.synchronize()
        return self._timeline.read(restart=restart)

    def check(self) -> None:
        self._core.check()

    def close(self) -> None:
        core = self._core
        if core.closed:
            return
        core.closed = True
        core.calls.synchronize()
        self._release_sms()
        if self._scale_out is not None:
            self._scale_out.close()
        if self._engine.error() is not None:
            return  # a rank that lives on may still write here: the memory ends with the process
        core.receive.close()
        core.expose.close()
        core.calls.close()
        self._engine.close()


def _check_limits(topology: Topology, config: Config, fabric: str) -> int:
    """SMs that run beside this rank's calls; raises ValueError for what cannot be."""
    for name, limit in (("num_topk", "MAX_DESTS"), ("num_experts", "MAX_EXPERTS")):
        if abi.available and getattr(config, name) > abi.constants[limit]:
            raise ValueError(
                f"{name}: {getattr(config, name)} exceeds the {abi.constants[limit]} that "
                "backend 'cuda' can do"
            )
    return nic_sms(fabric) if topology.num_nodes > 1 else 0
