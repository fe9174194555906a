"""What memory a Buffer may take on the CPU."""

from ..backend import Config, Options
from ..fabric.memory_report import report_fabric
from ..formats.wire import WireFormat
from ..native import combine_record, dispatch_record
from ..results import Layout, MemoryReport
from ..topology import Topology
from .announce import announcement_bytes
from .control import ControlBlock
from .node import message_sizes
from .scaleout_fabric import fabric_options, region_bytes
from .window import combine_parts, dispatch_parts


def report_memory(
    config: Config,
    topology: Topology,
    layout: Layout,
    alignment: int,
    fmt: WireFormat,
    fabric: str = "auto",
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
            **report_scale_out(config, topology, fmt, fabric),
            "handle": (handle, "per handle alive: choices, rows, forwarded records"),
        }
    )


def report_scale_out(
    config: Config, topology: Topology, fmt: WireFormat, fabric: str
) -> dict[str, tuple[int, str]]:
    """Bytes that messages between nodes take on a rank, by purpose."""
    hidden, num_topk, others = config.hidden, config.num_topk, topology.num_nodes - 1
    if not fabric.startswith("proxy/"):
        record = max(
            dispatch_record(fmt, hidden, num_topk).bytes,
            combine_record(WireFormat.BF16, hidden, num_topk, True).bytes,
        )
        return {
            "scale-out staging": (
                2 * others * config.max_tokens * record,
                f"in and out: {others} other nodes x {config.max_tokens} records of {record} bytes",
            )
        }
    sizes = message_sizes(topology, config)
    signals, *staging = region_bytes(topology.num_nodes, sizes).values()
    # Whatever is chosen for a rank, the sizes are the same.
    options = fabric_options(topology, Options(60.0, 1, False, fabric=fabric))
    return {
        "scale-out staging": (
            sum(staging),
            f"in and out: {topology.num_nodes} nodes x ({config.max_tokens} records of up to "
            f"{sizes.records // max(1, config.max_tokens)} bytes (float32 rows) and two "
            "announcements); pages exist once written",
        ),
        "scale-out signals": (signals, "counters of messages, by node and kind"),
        **report_fabric(options, topology.num_nodes, signals // 8),
    }
