"""The case "triggers": rings and proxy threads by themselves, and what they could feed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from epcomm.backend import Config
from epcomm.cuda.rail import CHUNK_RECORDS, CHUNK_RECORDS_OVER, plan_rail
from epcomm.formats.wire import WireFormat
from epcomm.native import dispatch_record
from epcomm.topology import Topology

from ..options import Shape
from ..triggers import CORES, NIC_GB_S, Sweep, TriggerFigure, feed, measure_latency, measure_rings
from .figures import Table
from .goals import Goal, Goals
from .runner import Runner

SWEEP = Sweep(threads=(1, 2, 4))


def numbers_of_ranks(ranks: int) -> list[int]:
    """2 and its doubles, and all."""
    return sorted({2**i for i in range(1, 12) if 2**i < ranks} | {ranks})


@dataclass
class TriggerTable:
    """What was measured; the same on all ranks that took part."""

    figures: list[TriggerFigure] = field(default_factory=list)
    latencies: dict[int, float] = field(default_factory=dict)

    @property
    def cost_ns(self) -> float:
        """Processor time of a trigger, where it is dearest."""
        return max((figure.proxy_ns for figure in self.figures), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        figures = [asdict(figure) for figure in self.figures]
        return {"figures": figures, "latency_us_of_ranks": self.latencies}


def chunk_bytes(shape: Shape, wanted_records: int) -> int:
    """Of a chunk of FP8 records, the smallest, of a buffer for ``shape``."""
    topology = Topology(0, tuple(rank // shape.ranks_per_node for rank in range(shape.ranks)))
    config = Config(shape.hidden, shape.experts, shape.topk, shape.tokens, "cuda")
    plan = plan_rail(topology, config, chunk_records=wanted_records)
    record = dispatch_record(WireFormat.FP8, shape.hidden, shape.topk)
    return int(plan.chunking["chunk_records"]) * record.bytes


def measure_triggers(
    runner: Runner, shape: Shape, kind: Any, out: Table, sweep: Sweep = SWEEP
) -> TriggerTable:
    """For every number of ranks, each a node of its own. Collective."""
    table = TriggerTable()
    out.say(f"triggers: local-cuda, empty triggers\n  {TriggerFigure.HEADER}")
    for ranks in numbers_of_ranks(shape.ranks):
        runner.attempt(f"triggers of {ranks} ranks", ranks, _on(kind, sweep, table, out))
    return table


def _on(kind: Any, sweep: Sweep, table: TriggerTable, out: Table) -> Callable[[Any], None]:
    def measure(comm: Any) -> None:
        for figure in measure_rings(comm, kind, sweep):
            table.figures.append(figure)
            out.say(f"  {figure}")
        latency = measure_latency(comm, kind, sweep)
        table.latencies[comm.size] = latency
        out.say(f"  trigger to the peer's counter, {comm.size // 2} pairs: {latency:.2f} us")

    return measure


def judge_triggers(world: Any, table: TriggerTable, shape: Shape, goals: Goals) -> None:
    """Whether the proxy can feed an NIC, by computation. Collective."""
    cost = max(world.allgather(table.cost_ns))
    for records in (CHUNK_RECORDS, CHUNK_RECORDS_OVER["local-cuda"]):
        nbytes = chunk_bytes(shape, records)
        seen = feed(nbytes, cost) if cost else None
        note = f"{cost:.0f} ns a trigger without the post, chunks of {nbytes} bytes"
        what = f"{CORES} cores of proxies could feed, by computation"
        goals.add(Goal("triggers", what, NIC_GB_S, False, "GB/s", seen, note))
