"""The two-hop path of one rank: staging, the fabric to its rail peers, and its kernels' parameters.

A one-node call's parameter block becomes a two-hop call's by what is added here; see
``csrc/include/epcomm_cuda_rail.h``.
"""

import weakref
from dataclasses import replace
from typing import Any

import cupy
import numpy as np
import torch
from cupy.cuda import runtime

from .. import native
from ..backend import Config, Options
from ..bootstrap import Bootstrap, raise_together
from ..errors import FabricError
from ..fabric.fabric import Fabric, FabricOptions, RegionMemory, RingMemory
from ..fabric.ladder import resolve
from ..native import combine_record, constants, dispatch_record
from ..timeline import MAX_MESSAGES
from ..topology import Topology
from ..traffic import LinkTraffic, Traffic
from . import abi
from .memory import DeviceBlock, PinnedBlock
from .nics import nic_sms, with_nic_sms
from .rail import (
    RailPlan,
    chunk_records_of,
    fabric_options,
    fill_hops,
    fill_rail,
    hop_shapes,
    places_of,
    plan_rail,
)
from .two_hop import Hops, TwoHopBlocks

_TORCH: dict[type, torch.dtype] = {np.int32: torch.int32, np.int64: torch.int64}


class _Memory:
    """Zeroed device memory that lives until nobody holds this object any more."""

    def __init__(self, num_bytes: int) -> None:
        block = DeviceBlock(num_bytes)
        runtime.memset(block.pointer, 0, block.num_bytes)
        self.pointer, self.num_bytes = block.pointer, block.num_bytes
        weakref.finalize(self, block.close).atexit = False


class _Pinned:
    """The same in page-locked host memory."""

    def __init__(self, num_bytes: int) -> None:
        block = PinnedBlock(num_bytes)
        self.pointer = block.pointer
        weakref.finalize(self, block.close).atexit = False


class ScaleOut:
    """What a rank in a world of several nodes has beside its Engine. Made collectively.

    Args:
        bootstrap: of the world.
        topology, config, options: of the buffer; ``options.fabric`` names what carries chunks.

    Raises:
        ValueError: the fabric cannot number or address as much as the buffer may send, or
            ``config.max_staging_bytes`` are too few.
        FabricError, PeerError: the fabric cannot be made, here or on another rank; "auto", and
            there is none for these ranks.
    """

    def __init__(
        self,
        bootstrap: Bootstrap,
        topology: Topology,
        config: Config,
        options: Options,
    ) -> None:
        self.topology, self.config = topology, config
        transport, arguments = resolve(bootstrap, topology, options.fabric, self._trial_region)
        if nic_sms(options.fabric):
            arguments = with_nic_sms(options.fabric)
        error: Exception | None = None
        try:
            self.plan: RailPlan = plan_rail(
                topology, config, chunk_records=chunk_records_of(transport)
            )
            abi.check(native.library.epcomm_cuda_load_two_hop(), "loading the two-hop kernels")
            memory = {i: _Memory(n) for i, n in self.plan.region_bytes().items()}
            fabric_options = self._fabric_options(options, transport, arguments)
            rings = self._ring_memory(fabric_options)
        except (ValueError, RuntimeError) as caught:
            error = caught
        raise_together(bootstrap, error)
        device = torch.cuda.current_device()
        self._device = torch.device("cuda", device)
        regions = {
            i: RegionMemory(m.pointer, m.num_bytes, m, device=device) for i, m in memory.items()
        }
        runtime.deviceSynchronize()
        self.fabric = Fabric(bootstrap, topology, fabric_options, regions, rings)
        self._state = {
            name: cupy.zeros(shape, dtype)
            for name, (shape, dtype) in self.plan.state_shapes().items()
        }
        self._state["places"] = cupy.asarray(places_of(topology))
        self._state["rail"] = cupy.asarray(np.array(topology.rail, np.int32))
        runtime.deviceSynchronize()
        rail = np.zeros((), abi.dtypes["rail"])
        fill_rail(
            rail,
            self.plan,
            self.fabric.struct,
            self.fabric.ibgda,
            {i: m.pointer for i, m in memory.items()},
            {name: array.data.ptr for name, array in self._state.items()},
        )
        self.blocks = TwoHopBlocks(config, rail)

    def _fabric_options(self, options: Options, transport: str, arguments: str) -> FabricOptions:
        how = fabric_options(
            transport,
            arguments,
            num_channels=int(self.plan.chunking["num_channels"]),
            threads=2 if options.own_core and options.num_threads >= 4 else 1,
            spin=1000 if options.own_core else 0,
        )
        kept = MAX_MESSAGES if options.timeline is not None else 0
        return replace(how, timeout=options.timeout, max_messages=kept)

    @staticmethod
    def _ring_memory(options: FabricOptions) -> RingMemory:
        host_bytes, producer_bytes = RingMemory.sizes(options)
        host, producers = _Pinned(host_bytes), _Memory(producer_bytes)
        return RingMemory(host.pointer, producers.pointer, (host, producers))

    @staticmethod
    def _trial_region() -> RegionMemory:
        """Enough of this rank's GPU to try whether a network card reaches it."""
        memory = _Memory(1 << 16)
        runtime.deviceSynchronize()
        device = torch.cuda.current_device()
        return RegionMemory(memory.pointer, memory.num_bytes, memory, device=device)

    # Routes -------------------------------------------------------------------------------

    def make_hops(self, num_tokens: int, layout: int) -> Hops:
        """Unwritten arrays for a handle, on the current stream."""
        by_expert = layout == constants["LAYOUT_EXPERT"]
        shapes = hop_shapes(self.plan, self.topology, self.config, num_tokens, by_expert=by_expert)
        arrays = {
            name: torch.empty(shape, dtype=_TORCH[dtype], device=self._device)
            for name, (shape, dtype) in shapes.items()
        }
        block = np.zeros((), abi.dtypes["hops"])
        fill_hops(
            block,
            {name: array.data_ptr() for name, array in arrays.items()},
            self.topology,
            self.config,
            by_expert=by_expert,
        )
        return Hops(arrays, block)

    # Accounting ---------------------------------------------------------------------------

    def count(
        self, name: str, ranks: torch.Tensor, hops: Hops, row_bytes: int, agreed: Any
    ) -> Traffic:
        """What this rank moved in a call with these routes (blocks).

        Args:
            name: "dispatch" or "combine".
            ranks: local rank of every copy in this node, int16 [T, K], -1 for none.
            hops: of the routes.
            row_bytes: of a row, with its scales.
            agreed: ``engine.Agreed`` of the call.
        """
        by_expert = agreed.layout == constants["LAYOUT_EXPERT"]
        arrays = hops.arrays
        received, sent = arrays["received"].cpu().numpy(), arrays["sent"].cpu().numpy()
        rows = _rows_elsewhere(ranks, self.topology.local_rank, by_expert)
        for peer, count in enumerate(received.tolist()):
            lists = arrays["forwarded"][peer, :count].view(torch.int16)
            ranks_of_copies = lists.view(count, self.config.num_topk, 4)[..., 0]
            rows += _rows_elsewhere(ranks_of_copies, self.topology.local_rank, by_expert)
        mine, theirs = (sent, received) if name == "dispatch" else (received, sent)
        hidden, num_topk = self.config.hidden, self.config.num_topk
        if name == "dispatch":
            record = dispatch_record(agreed.format, hidden, num_topk)
            row_meta = 8 + (4 if by_expert else 12 * num_topk)
        else:
            record = combine_record(agreed.wire, hidden, num_topk, agreed.with_weights)
            row_meta = (4 if by_expert else 4 * num_topk) if agreed.with_weights else 0
        chunk = int(self.plan.chunking["chunk_records"])
        messages = int((-(-mine // chunk)).sum())
        if self.plan.bounded:  # and credits
            messages += int((-(-theirs // chunk) - self.plan.held_chunks).clip(0).sum())
        payload, records = record.payload_bytes + record.scale_bytes, int(mine.sum())
        announced, peers = self.plan.announcement_bytes, self.plan.num_peers
        others = self.topology.ranks_per_node - 1
        return Traffic(
            scale_up=LinkTraffic(
                rows, rows * row_bytes, rows * row_meta + announced * (peers + 1) * others
            ),
            scale_out=LinkTraffic(
                messages + peers,
                records * payload,
                records * (record.bytes - payload) + announced * peers,
            ),
            records=records,
        )

    # Errors and lifetime ------------------------------------------------------------------

    def failure(self) -> FabricError:
        """Why the fabric failed."""
        try:
            self.fabric.check()
        except FabricError as error:
            return error
        return FabricError("the fabric refused a command, and does not say why")

    def close(self) -> None:
        """End the proxy threads. Memory ends with the last that uses it."""
        self.fabric.close()
        self._state.clear()


def _rows_elsewhere(ranks: torch.Tensor, local_rank: int, by_expert: bool) -> int:
    """Rows of other ranks of the node, from lists of copies' local ranks, int16 [n, K]."""
    stands = (ranks >= 0) & (ranks != local_rank)
    if not by_expert:
        # The first of a rank stands for its row.
        stands[:, 1:] &= ranks[:, 1:] != ranks[:, :-1]
    return int(stands.sum())
