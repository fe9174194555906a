"""What memory a Buffer may take on the CPU."""

from ..backend import Config
from ..formats.wire import WireFormat
from ..native import combine_record, dispatch_record
from ..results import Layout, MemoryReport
from ..topology import Topology
from .announce import announcement_bytes
from .control import ControlBlock
from .window import combine_parts, dispatch_parts


def report_memory(
    config: Config, topology: Topology, layout: Layout, alignment: int, fmt: WireFormat
) -> MemoryReport:
    """Bytes by purpose on one rank, at most: every token of every rank wanting this rank."""
    hidden, num_topk = config.hidden, config.num_topk
    by_expert = layout == "expert"
    rows = topology.num_ranks * config.max_tokens
    if by_expert:
        experts_per_rank = config.num_experts // topology.num_ranks
        rows = rows * min(num_topk, experts_per_rank) + experts_per_rank * (alignment - 1)
    received = dispatch_parts(
        rows, fmt.payload_bytes(hidden), fmt.scale_bytes(hidden), num_topk, by_expert
    )
    exposed = combine_parts(rows, WireFormat.BF16.payload_bytes(hidden), num_topk, by_expert)
    others = topology.num_nodes - 1
    record = max(
        dispatch_record(fmt, hidden, num_topk).bytes,
        combine_record(WireFormat.BF16, hidden, num_topk, True).bytes,
    )
    handle = config.max_tokens * (12 * num_topk + 4 * topology.num_nodes)
    handle += others * config.max_tokens * 8 * num_topk
    slot = announcement_bytes(topology, config.num_experts)
    return MemoryReport(
        {
            "control": (
                ControlBlock.nbytes(topology.num_nodes, slot),
                f"counters, and two announcements of each of {topology.num_nodes} rail ranks",
            ),
            "received rows": (
                received.nbytes,
                f"per dispatch result alive: {rows} rows in {fmt.name}; pages exist once written",
            ),
            "rows to combine": (
                exposed.nbytes,
                f"during a combine: {rows} BF16 rows; none when they are in memory of epcomm's",
            ),
            "combined tokens": (
                2 * config.max_tokens * hidden,
                f"per combine result alive: {config.max_tokens} BF16 rows, without out=",
            ),
            "scale-out staging": (
                2 * others * config.max_tokens * record,
                f"in and out: {others} other nodes x {config.max_tokens} records of {record} bytes",
            ),
            "handle": (handle, "per handle alive: choices, rows, forwarded records"),
        }
    )
