"""The shared state of the CPU back end on one rank: memory, peers, signals, threads."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..backend import Config, Options
from ..bootstrap import Bootstrap, raise_together
from ..native import combine_record, constants, dispatch_record
from ..topology import Topology
from .announce import Announcer, announcement_bytes
from .control import ControlBlock, NodeControl, Waiting
from .phases import HostSpans
from .scaleout import ScaleOut
from .scaleout_fabric import FabricScaleOut, MessageSizes
from .segments import PeerWindows, Segment, WindowPool
from .timeline import HostTimeline
from .window import combine_parts, dispatch_parts


class Node:
    """Everything two calls share. Made collectively."""

    def __init__(
        self, bootstrap: Bootstrap, topology: Topology, config: Config, options: Options
    ) -> None:
        self.topology = topology
        self.config = config
        self.scale_out = _make_scale_out(bootstrap, topology, config, options)
        self.timeline: HostTimeline | None = None
        if options.timeline is not None:
            self.timeline = HostTimeline(topology, options.timeline, self.scale_out, options.fabric)
        self.experts_per_rank = config.num_experts // topology.num_ranks
        slot_bytes = announcement_bytes(topology, config.num_experts)
        control_bytes = ControlBlock.nbytes(topology.num_nodes, slot_bytes)
        blocks = _share_control(bootstrap, topology, control_bytes)
        self.control = NodeControl(topology, blocks, self.scale_out, options)
        self.announcer = Announcer(topology, config.num_experts, self.control, self.scale_out)
        self.windows = WindowPool(window_bytes(config, topology.num_ranks))
        self.peer_windows = PeerWindows()
        self.local_of_E = np.full(config.num_experts, -1, np.int64)
        for local, rank in enumerate(topology.node_ranks):
            first = rank * self.experts_per_rank
            self.local_of_E[first : first + self.experts_per_rank] = local
        self._threads = None
        self._num_threads = options.num_threads
        if options.num_threads > 1:
            self._threads = ThreadPoolExecutor(options.num_threads, "epcomm")

    @property
    def spans(self) -> HostSpans | None:
        """Where phases of calls are kept, if anywhere."""
        return None if self.timeline is None else self.timeline.spans

    def window_addresses(
        self, headers: np.ndarray, needed_L: np.ndarray, what: Waiting
    ) -> np.ndarray:
        """Where the windows announced by this node's ranks are mapped here, int64 [L].

        Only ``needed_L`` (bool [L]) are mapped, 0 stands for the others: a rank that waits for
        nothing from this one may have finished the call and closed its buffer already.

        Raises:
            PeerTimeoutError: a rank has gone since it announced its window.
            OSError: this process may not map it.
        """
        addresses = np.zeros(self.topology.ranks_per_node, np.int64)
        for local in np.flatnonzero(needed_L):
            rank = self.topology.node_ranks[local]
            header = headers[rank]
            if rank == self.topology.rank:
                addresses[local] = self.windows.address(int(header["window_serial"]))
                continue
            pid = self.control.blocks[local].pid
            fd, serial = int(header["window_fd"]), int(header["window_serial"])
            nbytes = int(header["window_bytes"])
            try:
                addresses[local] = self.peer_windows.address(pid, fd, serial, nbytes)
            except FileNotFoundError:
                self.control.lost(rank, what)
        return addresses

    def for_items(self, kernel: Callable[..., None], items: np.ndarray, *args: Any) -> None:
        """Run a kernel over items (int32 indices), on this rank's threads."""
        if items.size == 0:
            return
        if self._threads is None or items.size < 2 * self._num_threads:
            kernel(items, *args)
            return
        parts = np.array_split(items, self._num_threads)
        for done in [self._threads.submit(kernel, part, *args) for part in parts]:
            done.result()

    def close(self) -> None:
        """Stop the threads; memory goes with the last reference."""
        if self._threads is not None:
            self._threads.shutdown(wait=False)
        self.scale_out.close()


def _make_scale_out(
    bootstrap: Bootstrap, topology: Topology, config: Config, options: Options
) -> ScaleOut:
    """The messages between nodes that the user chose. Collective."""
    if not options.fabric.startswith("proxy/"):
        return bootstrap.scale_out()
    return FabricScaleOut(bootstrap, topology, message_sizes(topology, config), options)


def message_sizes(topology: Topology, config: Config) -> MessageSizes:
    """Room for float32 rows, or a float32 wire with weights."""
    hidden, num_topk, f32 = config.hidden, config.num_topk, constants["FORMAT_F32"]
    record = max(
        dispatch_record(f32, hidden, num_topk).bytes,
        combine_record(f32, hidden, num_topk, True).bytes,
    )
    return MessageSizes(
        announcement_bytes(topology, config.num_experts), config.max_tokens * record
    )


def _share_control(bootstrap: Bootstrap, topology: Topology, nbytes: int) -> list[ControlBlock]:
    """Make this rank's control segment and map those of its node. Collective; fails on all."""
    error: OSError | None = None
    own: Segment | None = None
    try:
        own = Segment.create("epcomm-control", nbytes)
    except OSError as caught:
        error = caught
    raise_together(bootstrap, error)
    assert own is not None
    identity = ControlBlock(own, os.getpid()).identity
    identity[:] = (topology.rank, os.getpid(), constants["limit_abi_version"])
    endpoints = bootstrap.allgather((os.getpid(), own.fd))
    blocks = []
    try:
        for rank in topology.node_ranks:
            pid, fd = endpoints[rank]
            mine = rank == topology.rank
            segment = own if mine else Segment.open_peer(pid, fd, nbytes)
            block = ControlBlock(segment, pid)
            expected = (rank, pid, constants["limit_abi_version"])
            if tuple(block.identity[0]) != expected:
                raise OSError(
                    f"the shared memory of rank {rank} says (rank, pid, ABI version) "
                    f"{tuple(block.identity[0])}, expected {expected}; do all ranks run the same "
                    "epcomm?"
                )
            blocks.append(block)
    except OSError as caught:
        error = caught
    # Nobody may let go of its descriptor before every peer has opened it.
    raise_together(bootstrap, error)
    return blocks


def most_rows(config: Config, num_ranks: int) -> tuple[int, int]:
    """Most rows a rank can receive: (layout rank, layout expert with any alignment)."""
    experts_per_rank = config.num_experts // num_ranks
    tokens = num_ranks * config.max_tokens
    padding = experts_per_rank * (constants["limit_max_alignment"] - 1)
    return tokens, tokens * min(config.num_topk, experts_per_rank) + padding


def window_bytes(config: Config, num_ranks: int) -> int:
    """Size of a window: float32 rows in the larger layout. Pages exist once written."""
    by_rank, by_expert = most_rows(config, num_ranks)
    row_bytes, num_topk = 4 * config.hidden, config.num_topk
    return max(
        dispatch_parts(by_rank, row_bytes, 0, num_topk, False).nbytes,
        dispatch_parts(by_expert, row_bytes, 0, num_topk, True).nbytes,
        combine_parts(by_rank, row_bytes, num_topk, False).nbytes,
        combine_parts(by_expert, row_bytes, num_topk, True).nbytes,
    )
