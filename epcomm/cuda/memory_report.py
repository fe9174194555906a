"""What memory a Buffer may take on a GPU. Needs the library's CUDA part, but no GPU."""

from .. import native
from ..backend import Config
from ..cpu.window import combine_parts, dispatch_parts
from ..formats.wire import WireFormat
from ..results import Layout, MemoryReport
from ..topology import Topology
from . import abi
from .rail import report_staging
from .sizes import EXPOSED_WINDOWS, RECEIVE_WINDOWS, window_bytes


def report_memory(
    config: Config,
    topology: Topology,
    layout: Layout,
    alignment: int,
    fmt: WireFormat,
    fixed_rows: int | None,
    fabric: str = "auto",
) -> MemoryReport:
    """Bytes by purpose on one rank, at most: every token of every rank wanting this rank.

    Raises:
        ValueError: the library was built without CUDA.
    """
    if not abi.available:
        raise ValueError("backend: 'cuda' is not in this build of libepcomm")
    hidden, num_topk, R = config.hidden, config.num_topk, topology.num_ranks
    by_expert = layout == "expert"
    experts_per_rank = config.num_experts // R
    rows = R * config.max_tokens
    if by_expert:
        rows = rows * min(num_topk, experts_per_rank) + experts_per_rank * (alignment - 1)
    if fixed_rows is not None:
        rows = fixed_rows
    received = dispatch_parts(
        rows, fmt.payload_bytes(hidden), fmt.scale_bytes(hidden), num_topk, by_expert
    )
    exposed = combine_parts(rows, WireFormat.BF16.payload_bytes(hidden), num_topk, by_expert)
    copies = num_topk if by_expert or topology.num_nodes > 1 else min(num_topk, R)
    handle = config.max_tokens * 8 * (copies + num_topk) + 4 * (R + 2 * experts_per_rank + 2)
    control = native.library.epcomm_cuda_control_bytes(topology.num_nodes, R, config.num_experts)
    return MemoryReport(
        {
            "control": (control, f"counters, and two announcements of each of {R} ranks"),
            "received rows": (
                RECEIVE_WINDOWS * window_bytes(received.nbytes),
                f"{RECEIVE_WINDOWS} windows of {rows} rows in {fmt.name} and a quarter more; "
                "another one when results hold them all",
            ),
            "rows to combine": (
                EXPOSED_WINDOWS * window_bytes(exposed.nbytes),
                f"{EXPOSED_WINDOWS} windows of {rows} BF16 rows and a quarter more",
            ),
            "combined tokens": (
                2 * config.max_tokens * hidden,
                f"per combine result alive: {config.max_tokens} BF16 rows, without out=",
            ),
            "handle": (handle, "per handle alive: choices and rows"),
            **report_staging(topology, config, fabric),
        }
    )
