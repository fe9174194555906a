"""The timeline of a rank of the CPU back end: phases of its calls, messages of emulated NICs."""

from ..clocks import HostClock
from ..fabric.fabric import Fabric
from ..nic_notes import NicNotes
from ..timeline import MAX_MESSAGES, Clock, Lost, Trace, make_trace
from ..topology import Topology
from ..trace_events import events_of_host
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
        notes = NicNotes.read(self._fabric)
        base = min([*(span.begin for span in spans), *notes.times], default=0)
        events = events_of_host(spans, topology.rank, base)
        events += notes.trace_events(topology.rank, topology.rail, base)
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
            lost=Lost(lost_spans, notes.lost_messages, notes.lost_incidents),
            not_shown=self._not_shown,
            modelled=self._fabric is not None,
        )
