"""The timeline of a rank of the CUDA back end: rings on the GPU, its NICs' messages, the trace."""

import ctypes
from typing import Any

import cupy
import numpy as np

from .. import native
from ..clocks import HostClock
from ..fabric.abi import dtypes as fabric_dtypes
from ..fabric.fabric import Fabric
from ..nic_notes import NicNotes
from ..timeline import MAX_MESSAGES, Clock, Lost, Trace, make_trace
from ..topology import Topology
from ..trace_events import Channels, events_of_kernels, unroll
from . import abi
from .device import Device
from .scaleout import ScaleOut

#: Spans that each thread block keeps; some hundred kilobytes.
CAPACITY = 1 << 12


class GpuTimeline:
    """Rings that kernels note into, and what the NICs tell of messages.

    Args:
        topology: of the world.
        clock: of the host.
        device: the GPU.
        scale_out: the way to other nodes.
    """

    def __init__(
        self,
        topology: Topology,
        clock: HostClock,
        device: Device,
        scale_out: ScaleOut | None,
    ) -> None:
        self._topology, self._clock = topology, clock
        self._domain = f"GPU {device.identity}"
        num_blocks = device.num_sms  # of a call
        self._spans = cupy.zeros(num_blocks * CAPACITY * abi.dtypes["span"].itemsize, np.uint8)
        self._counts = cupy.zeros(num_blocks, np.uint64)
        block = np.zeros(1, abi.dtypes["timeline"])
        block["spans"], block["counts"] = self._spans.data.ptr, self._counts.data.ptr
        block["capacity"], block["num_blocks"] = CAPACITY, num_blocks
        self._block = cupy.asarray(block.view(np.uint8))
        cupy.cuda.runtime.deviceSynchronize()
        self._channels = _channels_of(scale_out)
        self._fabric: Fabric | None = None
        self._not_shown: list[str] = []
        if scale_out is not None and scale_out.fabric.keep_messages(MAX_MESSAGES):
            self._fabric = scale_out.fabric
        elif scale_out is not None:
            transport = scale_out.fabric.options.transport
            self._not_shown.append(
                f"messages on the network: transport {transport!r} does not tell when it carries "
                "them; the flight of a chunk goes from its put to the first end of a wait for it"
            )

    @property
    def pointer(self) -> int:
        """Of ``epcomm_cuda_timeline``."""
        return int(self._block.data.ptr)

    def read(self, *, restart: bool) -> Trace:
        """The trace of calls that have ended; ``restart``: then forget what it shows."""
        counts = self._counts.get()
        spans = self._spans.get().view(abi.dtypes["span"]).reshape(len(counts), CAPACITY)
        spans, lost = unroll(spans, counts)
        notes = NicNotes.read(self._fabric)
        if restart:
            # A fill of CuPy's would first have to compile a kernel.
            cupy.cuda.runtime.memset(self._counts.data.ptr, 0, counts.nbytes)
            cupy.cuda.runtime.deviceSynchronize()
            if self._fabric is not None:
                self._fabric.keep_messages(MAX_MESSAGES)
        topology = self._topology
        # Both are by the GPU's timer.
        base = min([*spans["begin"].tolist(), *notes.times], default=0)
        events = events_of_kernels(spans, _ROLES, topology.rank, self._channels, base)
        events += notes.trace_events(topology.rank, topology.rail, base)
        return make_trace(
            events,
            base,
            self._compare(),
            rank=topology.rank,
            node=topology.node,
            local_rank=topology.local_rank,
            lost=Lost(lost, notes.lost_messages, notes.lost_incidents),
            not_shown=self._not_shown,
            modelled=self._fabric is not None,
        )

    def _compare(self) -> Clock:
        """The GPU's timer and the host's clock, now."""
        ns, host_ns, error_ns = (ctypes.c_int64() for _ in range(3))
        code = native.library.epcomm_cuda_compare_clocks(
            *(ctypes.byref(value) for value in (ns, host_ns, error_ns))
        )
        abi.check(code, "comparing the clocks of GPU and host")
        return Clock(
            self._domain,
            ns.value,
            host_ns.value,
            error_ns.value,
            self._clock.offset_ns,
            self._clock.error_ns,
        )


_ROLES = {
    number: name.removeprefix("ROLE_").lower()
    for name, number in abi.constants.items()
    if name.startswith("ROLE_")
}


def _channels_of(scale_out: ScaleOut | None) -> Channels:
    """Channels of chunks."""
    if scale_out is None:
        return Channels()
    fabric, plan = scale_out.fabric, scale_out.plan
    planes, ibgda = 1, fabric.ibgda
    if ibgda is not None:
        fields: Any = np.frombuffer(ibgda, fabric_dtypes["ibgda"])[0]
        planes = int(fields["num_planes"])
    return Channels(int(plan.chunking["num_channels"]), plan.held_chunks, planes)
