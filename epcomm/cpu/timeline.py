"""The timeline of a rank of the CPU back end: phases of its calls, messages of emulated NICs."""

import numpy as np

from ..clocks import HostClock
from ..fabric.abi import dtypes
from ..fabric.fabric import Fabric
from ..timeline import MAX_MESSAGES, Clock, Trace, make_trace
from ..topology import Topology
from ..trace_events import begins_of_messages, events_of_host, events_of_messages
from .phases import HostSpans
from .scaleout import ScaleOut
from .scaleout_fabric import FabricScaleOut


class HostTimeline:
    """What a rank notes while it makes calls.

    Args:
        topology: of the world.
        clock: of the host.
        scale_out: what carries messages between nodes, named ``fabric``.
    """

    def __init__(
        self, topology: Topology, clock: HostClock, scale_out: ScaleOut, fabric: str
    ) -> None:
        self.spans = HostSpans()
        self._topology, self._clock = topology, clock
        self._fabric: Fabric | None = None
        self._not_shown: list[str] = []
        if isinstance(scale_out, FabricScaleOut) and scale_out.fabric.keep_messages(MAX_MESSAGES):
            self._fabric = scale_out.fabric
        elif topology.num_nodes > 1:
            self._not_shown.append(
                f"messages between nodes: fabric {fabric!r} does not tell when it carries them"
            )

    def read(self, *, restart: bool) -> Trace:
        """The trace; ``restart``: then forget what it shows."""
        topology, clock = self._topology, self._clock
        spans, lost_spans = self.spans.read()
        messages, total = np.zeros(0, dtypes["message"]), 0
        starts = [span.begin for span in spans]
        if self._fabric is not None:
            messages, total = self._fabric.messages()
            starts += begins_of_messages(messages).tolist()
        base = min(starts, default=0)
        events = events_of_host(spans, topology.rank, base)
        events += events_of_messages(messages, topology.rank, topology.rail, base)
        if restart:
            self.spans.restart()
            if self._fabric is not None:
                self._fabric.keep_messages(MAX_MESSAGES)
        return make_trace(
            events,
            base,
            Clock(
                clock.domain,
                host_offset_ns=clock.offset_ns,
                host_error_ns=clock.error_ns,
            ),
            rank=topology.rank,
            node=topology.node,
            local_rank=topology.local_rank,
            lost_spans=lost_spans,
            lost_messages=total - len(messages),
            not_shown=self._not_shown,
            modelled=self._fabric is not None,
        )
