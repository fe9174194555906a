"""Sizes and places of what the two-hop path needs beside a node's: staging, signals, hop lists.

No CUDA is called here, so that the same numbers can be had, and tested, without a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..backend import Config
from ..fabric.abi import constants as fabric_constants
from ..fabric.fabric import FabricOptions
from ..fabric.ladder import TRANSPORTS
from ..fabric.memory_report import report_fabric
from ..formats.wire import WireFormat
from ..native import combine_record, constants, dispatch_record, dtypes, library
from ..topology import Topology

#: Records of a chunk, which one put carries, unless the fabric's signals force longer ones. A chunk
#: of 64 packed rows of H = 7168 has 480 kB: 10 us of a 50 GB/s link, several triggers' cost.
CHUNK_RECORDS = 64
#: Longer where each costs CUDA calls of the rank's carrier.
CHUNK_RECORDS_OVER = {"local-cuda": 256}
#: Queue pairs of a rank with one or two peers; a card serves several at once, each only so fast.
_QUEUE_PAIRS = 16
_FEWEST_CHANNELS = 4
#: A kernel cannot wake a proxy thread, so a nap adds to the first trigger's latency.
_LONGEST_NAP = 50e-6
_ALIGN = constants["limit_window_align"]


def largest_record(config: Config) -> int:
    """Bytes of the largest record of any call: float32 rows, or a float32 wire with weights."""
    hidden, num_topk = config.hidden, config.num_topk
    return max(
        dispatch_record(WireFormat.F32, hidden, num_topk).bytes,
        combine_record(WireFormat.F32, hidden, num_topk, True).bytes,
    )


@dataclass(frozen=True)
class RailPlan:
    """How a rank reaches the other ranks of its rail; the same sizes on every rank.

    Attributes:
        chunking: ``epcomm_chunking``, 0-d.
        announcement_bytes: of one announcement, padded.
    """

    chunking: np.ndarray
    announcement_bytes: int

    @property
    def num_peers(self) -> int:
        """N - 1."""
        return int(self.chunking["num_nodes"]) - 1

    @property
    def held_chunks(self) -> int:
        """W: chunks of a peer that staging holds, in each direction."""
        return int(self.chunking["held_chunks"])

    @property
    def bounded(self) -> bool:
        """Whether staging holds less than all records of a call."""
        return self.held_chunks < int(self.chunking["num_chunks"])

    @property
    def num_signals(self) -> int:
        """Counters that peers raise here: one a peer, and one or two for each place of each."""
        return self.num_peers * (1 + (2 if self.bounded else 1) * self.held_chunks)

    @property
    def staging_bytes(self) -> int:
        """Of both directions."""
        sizes = self.region_bytes()
        return sizes[constants["REGION_SEND"]] + sizes[constants["REGION_RECEIVE"]]

    def region_bytes(self) -> dict[int, int]:
        """Bytes of the fabric's regions, by number."""
        received, ahead = int(self.chunking["peer_bytes"]), int(self.chunking["ahead_bytes"])
        return {
            0: 8 * (self.num_signals + 1),  # and a word for answers
            constants["REGION_SEND"]: self.num_peers * (received + 2 * ahead),
            constants["REGION_RECEIVE"]: self.num_peers * received,
            constants["REGION_OUTBOX"]: 2 * self.announcement_bytes,
            constants["REGION_INBOX"]: 2 * self.num_peers * self.announcement_bytes,
        }

    def state_shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Zeroed device arrays that a rank's kernels alone use: fields of ``epcomm_cuda_rail``."""
        places = (self.num_peers, self.held_chunks)
        shapes: dict[str, tuple[tuple[int, ...], type]] = {
            "expected": (places, np.uint64),
            "filled": (places, np.uint32),
            "dealt": ((2,), np.uint32),
        }
        if self.bounded:
            shapes |= {"credited": (places, np.uint64), "emptied": (places, np.uint32)}
        return shapes


def announcement_bytes(topology: Topology, num_experts: int) -> int:
    """Bytes of an announcement, padded as in a control block."""
    counts = topology.num_nodes + topology.num_ranks + num_experts
    return -(-(constants["sizeof_announcement"] + 4 * counts) // _ALIGN) * _ALIGN


def plan_rail(
    topology: Topology,
    config: Config,
    *,
    chunk_records: int = CHUNK_RECORDS,
    num_channels: int | None = None,
) -> RailPlan:
    """Plan staging and signals for a world of several nodes.

    Args:
        topology: of the world.
        config: of the Buffer.
        chunk_records: records of a chunk, if signals and staging allow.
        num_channels: lanes to each peer; None: :func:`channels_to`.

    Raises:
        ValueError: more than the fabric can number or address; ``max_staging_bytes`` hold less than
            a chunk of each peer.
    """
    chunking = np.zeros((), dtypes["chunking"])
    chunking["num_nodes"], chunking["node"] = topology.num_nodes, topology.node
    chunking["max_records"] = max(1, config.max_tokens)
    chunking["num_channels"] = num_channels or channels_to(topology.num_nodes - 1)
    record, most = largest_record(config), config.max_staging_bytes
    result = library.epcomm_make_chunking(chunking.ctypes.data, record, chunk_records, most or 0)
    plan = RailPlan(chunking, announcement_bytes(topology, config.num_experts))
    if result == constants["PLAN_TOO_LARGE"]:
        raise ValueError(
            f"max_tokens: {config.max_tokens} records of {record} bytes for each of "
            f"{plan.num_peers} other nodes are more than the fabric can address; make it smaller, "
            "or pass max_staging_bytes, or less of them"
        )
    if result == constants["PLAN_TOO_SMALL"]:
        raise ValueError(
            f"max_staging_bytes: {most} bytes do not hold the shortest chunk of every other node: "
            f"{int(chunking['chunk_records'])} records of up to {record} bytes for each of "
            f"{plan.num_peers}, in and out, take {plan.staging_bytes} bytes; pass at least as many"
        )
    return plan


def hop_shapes(
    plan: RailPlan, topology: Topology, config: Config, num_tokens: int, *, by_expert: bool
) -> dict[str, tuple[tuple[int, ...], type]]:
    """Arrays of a handle, as fields of ``epcomm_cuda_hops``: (shape, dtype)."""
    peers, slots, K = plan.num_peers, int(plan.chunking["max_records"]), config.num_topk
    return {
        "index": ((num_tokens, K), np.int32),
        "far": ((num_tokens, max_far(topology, config)), np.int64),
        "token_of": ((peers, slots), np.int32),
        "base": ((topology.num_nodes, num_keys(topology, config, by_expert=by_expert)), np.int32),
        "forwarded": ((peers, slots, K), np.int64),
        "sent": ((peers,), np.int32),
        "received": ((peers,), np.int32),
    }


def max_far(topology: Topology, config: Config) -> int:
    """F: records of a token at most."""
    return min(config.num_topk, topology.num_nodes - 1)


def num_keys(topology: Topology, config: Config, *, by_expert: bool) -> int:
    """What rows of this node are counted by: its ranks, or its experts."""
    if not by_expert:
        return topology.ranks_per_node
    return config.num_experts // topology.num_nodes


def fill_hops(
    block: np.ndarray,
    addresses: Mapping[str, int],
    topology: Topology,
    config: Config,
    *,
    by_expert: bool,
) -> None:
    """Fill in an ``epcomm_cuda_hops``; ``addresses`` by field."""
    for name, address in addresses.items():
        block[name] = address
    block["max_far"] = max_far(topology, config)
    block["num_keys"] = num_keys(topology, config, by_expert=by_expert)


def fill_rail(
    block: np.ndarray,
    plan: RailPlan,
    fabric: bytes,
    ibgda: bytes | None,
    regions: Mapping[int, int],
    state: Mapping[str, int],
) -> None:
    """Fill in an ``epcomm_cuda_rail``.

    Args:
        block: the structure, 0-d.
        plan: of the rail.
        fabric: the ``epcomm_fabric`` that kernels take.
        ibgda: the ``epcomm_ibgda``, for kernels that post by themselves; None: they don't.
        regions: addresses of the regions by number.
        state: addresses of ``state_shapes`` arrays and of ``places`` and ``rail``.
    """
    block["chunking"] = plan.chunking.reshape(1).view(np.uint8)
    block["fabric"] = np.frombuffer(fabric, np.uint8)
    block["fabric_kind"] = fabric_constants["KIND_PROXY" if ibgda is None else "KIND_IBGDA"]
    if ibgda is not None:
        block["ibgda"] = np.frombuffer(ibgda, np.uint8)
    block["signals"] = regions[0]
    for name in ("send", "receive", "outbox", "inbox"):
        block[name] = regions[constants[f"REGION_{name.upper()}"]]
    for name, address in state.items():
        block[name] = address


def places_of(topology: Topology) -> np.ndarray:
    """``epcomm_cuda_place`` of every rank: int16 [R, 2], node and local rank."""
    return np.stack([topology.node_of_R, topology.local_of_R], axis=1).astype(np.int16)


def fill_record(block: np.ndarray, record: object) -> None:
    """Fill in an ``epcomm_record`` from a RecordLayout."""
    for name in block.dtype.names or ():
        block[name] = getattr(record, name)


def channels_to(num_peers: int) -> int:
    """Lanes to each of so many other nodes: where they are few, more to each.

    A power of two, so that planes get as many each.
    """
    most = max(_FEWEST_CHANNELS, _QUEUE_PAIRS // num_peers)
    return 1 << (most.bit_length() - 1)


def chunk_records_of(transport: str) -> int:
    """C, unless signals or ``max_staging_bytes`` make it another."""
    return CHUNK_RECORDS_OVER.get(transport, CHUNK_RECORDS)


def fabric_options(
    transport: str, arguments: str, *, num_channels: int, threads: int, spin: int
) -> FabricOptions:
    """How the fabric between GPUs runs, but for its timeout."""
    return FabricOptions(
        transport,
        arguments,
        num_channels=num_channels,
        num_rings=2,
        num_threads=threads,
        spin=spin,
        device_fills=True,
        longest_nap=_LONGEST_NAP,
    )


def report_staging(
    topology: Topology, config: Config, fabric: str = "auto"
) -> dict[str, tuple[int, str]]:
    """Bytes that scale-out takes on a rank, by purpose, for ``Buffer.explain_memory``.

    Raises:
        ValueError: as :func:`plan_rail`.
    """
    if topology.num_nodes == 1:
        return {}
    # Where the choice is left open, all that may be taken differs in nothing but chunks' length.
    transport = TRANSPORTS.get(fabric.partition(" ")[0], TRANSPORTS["ibgda"])
    plan = plan_rail(topology, config, chunk_records=chunk_records_of(transport))
    sizes = plan.region_bytes()
    length, record = int(plan.chunking["chunk_records"]), largest_record(config)
    held, ahead = int(plan.chunking["max_records"]), int(plan.chunking["ahead_records"])
    if plan.bounded:
        held = plan.held_chunks * length
    inbox = sizes[constants["REGION_INBOX"]] + sizes[constants["REGION_OUTBOX"]]
    hops = hop_shapes(plan, topology, config, config.max_tokens, by_expert=True)
    return {
        "scale-out staging": (
            plan.staging_bytes,
            f"device memory, in and out: {plan.num_peers} other nodes x {held} records of up to "
            f"{record} bytes (float32 rows)"
            + (f", {plan.held_chunks} chunks that take turns" if plan.bounded else "")
            + (f", and {ahead} of them twice more to write ahead" if ahead else ""),
        ),
        "scale-out signals": (
            sizes[0] + _bytes_of(plan.state_shapes()),
            f"device memory: {plan.num_signals} counters, and what they were after the last call",
        ),
        "scale-out announcements": (inbox, "device memory: two out, two in from each other node"),
        "scale-out routes": (
            _bytes_of(hops),
            "per handle alive: records, and the rows they became here",
        ),
        **report_fabric(
            fabric_options(
                *(transport, ""),
                num_channels=int(plan.chunking["num_channels"]),
                threads=1,
                spin=0,
            ),
            *(topology.num_nodes, plan.num_signals),
        ),
    }


def _bytes_of(shapes: Mapping[str, tuple[tuple[int, ...], type]]) -> int:
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
