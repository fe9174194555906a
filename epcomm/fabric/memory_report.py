"""What memory a fabric takes beside its regions."""

from ..native import library
from .fabric import FabricOptions, RingMemory


def report_fabric(
    options: FabricOptions, num_nodes: int, num_signals: int
) -> dict[str, tuple[int, str]]:
    """Bytes by purpose, as in a MemoryReport."""
    report = {
        "fabric rings": (
            sum(RingMemory.sizes(options)),
            f"{options.num_rings} rings of {options.num_slots} triggers, and the threads' state; "
            "in host memory",
        )
    }
    queues = library.epcomm_fabric_transport_bytes(
        options.transport.encode(), num_nodes, options.num_channels, num_signals
    )
    if queues > 0:
        report["fabric queues"] = (
            queues,
            f"queues of transport {options.transport!r}: {num_nodes - 1} other nodes x "
            f"{options.num_channels} channels",
        )
    return report
