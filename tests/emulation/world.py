"""Ranks of a world whose kernels run on the host: memory, parameter blocks and launches."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from fabrics import Fabric, Member, Proxies, aligned, declare
from kernels import Kernels, RankMemory, RouteArrays, Summed, compile_kernels, fill_combine

from epcomm import native
from epcomm.backend import Config
from epcomm.cuda import rail
from epcomm.fabric.abi import constants as fabric_constants
from epcomm.fabric.abi import dtypes as fabric_dtypes
from epcomm.formats.wire import WireFormat
from epcomm.native import combine_record, constants, dispatch_record
from epcomm.topology import Topology, make_topology


@cache
def build(folder: str) -> ctypes.CDLL:
    """Compile the emulated kernels into ``folder``."""
    library = compile_kernels(
        Path(folder) / "libemulated.so",
        "tests/emulation/two_hop.cc",
        "tests/emulation/logfmt.cc",
        "tests/emulation/emulated_nics.cc",
        "csrc/emulated/engine.cc",
    )
    pointer = ctypes.c_void_p
    library.emulate.argtypes = [pointer, pointer, ctypes.c_int32, pointer, ctypes.c_uint64]
    library.emulate.restype = None
    library.emulate_codec.argtypes = [pointer]
    library.emulate_codec.restype = None
    declare(library)
    return library


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("blocks", ctypes.c_int32),
        ("warps", ctypes.c_int32),
        ("delay_us", ctypes.c_int32),
        ("call", ctypes.c_void_p),
    ]


class _Stream(ctypes.Structure):
    _fields_ = [
        ("launches", ctypes.POINTER(_Launch)),
        ("num_launches", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


#: Of a first dispatch, of a combine (as ``fill_combine`` announces it), and of a cached dispatch:
#: what one call leaves out would be there of another.
_FIRST, _COMBINE, _CACHED, _WINDOWS = range(4)


class EmulatedWorld:
    """All ranks' memory and launches."""

    def __init__(
        self,
        library: ctypes.CDLL,
        ranks_per_node: int,
        num_ranks: int,
        config: Config,
        *,
        chunk_records: int = 2,
        blocks: int = 2,
        timeout: float = 60.0,
        window_bytes: int = 1 << 20,
        fabric: Fabric | None = None,
    ) -> None:
        self.library = library
        self.kernels = Kernels(library)
        self.dtypes, self.constants = self.kernels.dtypes, self.kernels.constants
        self.config, self.blocks = config, blocks
        self.fabric: Fabric = Proxies() if fabric is None else fabric
        self.ranks = [
            EmulatedRank(self, make_topology(r, [0] * num_ranks, ranks_per_node), chunk_records)
            for r in range(num_ranks)
        ]
        self.members = (Member * num_ranks)()
        for rank, member in zip(self.ranks, self.members, strict=True):
            rank.fill_member(member)
        self.fabric.make(library, self.members)
        for rank in self.ranks:
            rank.windows = [aligned(window_bytes) for _ in range(_WINDOWS)]
        for rank in self.ranks:
            rank.connect(timeout)

    def run(self, seed: int = 0) -> None:
        """Run what every rank has queued, all at once."""
        rng = np.random.default_rng(seed)
        table = (_Stream * len(self.ranks))()
        keep: list[Any] = []
        for entry, rank in zip(table, self.ranks, strict=True):
            launches = (_Launch * len(rank.queue))()
            for launch, (kind, call, warps) in zip(launches, rank.queue, strict=True):
                launch.kind, launch.blocks, launch.warps = kind, self.blocks, warps
                launch.delay_us = int(rng.integers(0, 3000))
                launch.call = call.ctypes.data
            keep += [launches, list(rank.queue)]
            entry.launches, entry.num_launches = launches, len(rank.queue)
            rank.queue = []
        self.library.emulate(
            ctypes.addressof(table),
            ctypes.addressof(self.members),
            len(self.ranks),
            self.fabric.nics,
            seed,
        )
        self.fabric.finish()


class EmulatedRank(RankMemory):
    """One rank: what Engine and ScaleOut hold on a GPU."""

    def __init__(self, world: EmulatedWorld, topology: Topology, chunk_records: int) -> None:
        self.world, self.topology, self.config = world, topology, world.config
        self.number = 0
        config = world.config
        self.plan = rail.plan_rail(
            topology, config, chunk_records=chunk_records, num_channels=world.fabric.channels
        )
        R, E = topology.num_ranks, config.num_experts
        super().__init__(world.kernels, topology.num_nodes, R, E)
        self.bins = np.zeros((world.blocks, topology.num_nodes + R + E), np.int32)
        self.regions = {i: aligned(n) for i, n in self.plan.region_bytes().items()}
        self.windows: list[np.ndarray] = []
        self.queue: list[tuple[int, np.ndarray, int]] = []
        self.state = aligned(fabric_dtypes["state"].itemsize)

    def fill_member(self, member: Member) -> None:
        """Say where this rank is in the fabric."""
        regions = [self.regions[i] for i in range(len(self.regions))]
        tables = (
            np.array(self.topology.rail, np.int32),
            np.array([region.ctypes.data for region in regions], np.uint64),
            np.array([region.nbytes for region in regions], np.uint64),
        )
        member.node, member.num_nodes = self.topology.node, self.topology.num_nodes
        member.rail, member.regions, member.sizes = (table.ctypes.data for table in tables)
        member.num_regions, member.silent_after = len(regions), -1
        member.state = self.state.ctypes.data
        self.keep += tables

    def connect(self, timeout: float) -> None:
        """Fill in the blocks that name other ranks' memory."""
        world, topology, d = self.world, self.topology, self.world.dtypes
        node = [world.ranks[r] for r in topology.node_ranks]
        table = np.array([[w.ctypes.data for w in rank.windows] for rank in node], np.uint64)
        block = np.zeros((), d["world"])
        block["rank"], block["num_ranks"] = topology.rank, topology.num_ranks
        block["num_nodes"], block["local_rank"] = topology.num_nodes, topology.local_rank
        block["num_local"], block["num_experts"] = len(node), self.config.num_experts
        block["num_topk"], block["num_windows"] = self.config.num_topk, len(self.windows)
        block["timeout_ns"] = int(timeout * 1e9)
        block["node_ranks"][: len(node)] = topology.node_ranks
        block["controls"][: len(node)] = [rank.control.ctypes.data for rank in node]
        block["windows"] = table.ctypes.data
        block["report"] = self.report_bytes.ctypes.data
        block["block_bins"] = self.bins.ctypes.data
        self.block = block
        arrays = {n: np.zeros(shape, t) for n, (shape, t) in self.plan.state_shapes().items()}
        arrays["places"] = rail.places_of(topology)
        arrays["rail"] = np.array(topology.rail, np.int32)
        self.rail_block = np.zeros((), d["rail"])
        rail.fill_rail(
            self.rail_block,
            self.plan,
            *world.fabric.structs(topology.rank),
            {i: region.ctypes.data for i, region in self.regions.items()},
            {name: array.ctypes.data for name, array in arrays.items()},
        )
        self.arrays = arrays
        self.keep.append(table)

    @property
    def error(self) -> np.ndarray:
        """The error record that the kernels wrote."""
        return self.report["error"].view(self.world.dtypes["error"]).reshape(())

    @property
    def fabric_error(self) -> np.ndarray:
        """What the fabric says of its failure; status 0: it works."""
        start, size = fabric_dtypes["state"].fields["error"][1], fabric_dtypes["error"].itemsize  # type: ignore[index]
        return self.state[start : start + size].view(fabric_dtypes["error"])[0]

    @property
    def losses(self) -> np.ndarray:
        """The planes that this rank has lost to peers, in order of time."""
        start, dtype = fabric_dtypes["state"].fields["losses"][1], fabric_dtypes["loss"]  # type: ignore[index]
        at = fabric_dtypes["state"].fields["num_losses"][1]  # type: ignore[index]
        count = min(int(self.state[at : at + 4].view(np.uint32)[0]), fabric_constants["MAX_LOSSES"])
        return self.state[start : start + count * dtype.itemsize].view(dtype)

    # Calls --------------------------------------------------------------------------------

    def _start(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(whole block, its one-node part, the announcement), zeroed but for world and rail."""
        d = self.world.dtypes
        block = np.zeros((), d[f"two_hop_{name}"])
        call = block["call"].view(d[name]).reshape(())
        call["world"] = self.block.reshape(1).view(np.uint8)
        block["rail"] = self.rail_block.reshape(1).view(np.uint8)
        return block, call, call["announcement"].view(native.dtypes["announcement"]).reshape(())

    def dispatch(
        self,
        x: np.ndarray,
        input_format: WireFormat,
        fmt: WireFormat,
        topk_idx: np.ndarray,
        weights: np.ndarray | None,
        *,
        scales: np.ndarray | None = None,
        by_expert: bool = False,
        alignment: int = 1,
        fixed_rows: int = -1,
        warps: int = 2,
        routes: "EmulatedRoutes | None" = None,
        status: int = 0,
    ) -> "EmulatedRoutes":
        """Queue a dispatch; with ``routes`` a cached one."""
        config = self.config
        cached = routes is not None
        routes = routes or EmulatedRoutes(self, topk_idx, by_expert)
        with_weights = weights is not None
        row = self.world.kernels.row(config, fmt, by_expert=by_expert, with_weights=with_weights)
        for name in ("dispatch",) if cached else ("layout", "dispatch"):
            block, call, announcement = self._start(name)
            announcement["op"] = constants["OP_CACHED_DISPATCH" if cached else "OP_DISPATCH"]
            announcement["format"], announcement["layout"] = fmt, int(by_expert)
            announcement["alignment"], announcement["fixed_rows"] = alignment, fixed_rows
            announcement["with_weights"], announcement["num_tokens"] = with_weights, len(x)
            announcement["window_bytes"] = self.windows[_FIRST].nbytes
            announcement["window_serial"] = _CACHED if cached else _FIRST
            announcement["status"] = status
            call["row"] = row.reshape(1).view(np.uint8)
            call["num_blocks"], call["number"] = self.world.blocks, self.number + 1
            routes.fill(block, call)
            if name == "dispatch":
                call["x"], call["row_in_bytes"] = x.ctypes.data, x.shape[1]
                call["scales"] = 0 if scales is None else scales.ctypes.data
                call["topk_weights"] = 0 if weights is None else weights.ctypes.data
                call["input_format"], call["announce"] = input_format, cached
                call["num_warps"] = warps
                block["forward_list"] = not cached
                record = dispatch_record(fmt, config.hidden, config.num_topk)
                rail.fill_record(block["record"].view(native.dtypes["record"]).reshape(()), record)
            # The layout kernel takes its block's number of warps from the emulator.
            self.queue.append((0 if name == "layout" else 1, block, warps))
        self.number += 1
        routes.row = row
        self.keep += [x, weights, scales, routes]
        return routes

    def received(
        self, routes: "EmulatedRoutes", fixed_rows: int = -1, *, cached: bool
    ) -> dict[str, np.ndarray]:
        """What lies in this rank's window after a dispatch."""
        rows = fixed_rows if fixed_rows >= 0 else int(routes.rows[self.topology.rank])
        window = self.windows[_CACHED if cached else _FIRST]
        return self.world.kernels.read_window(window, routes.row, rows)

    def combine(
        self,
        routes: "EmulatedRoutes",
        y: np.ndarray,
        fmt: WireFormat,
        wire: WireFormat,
        *,
        weights: np.ndarray | None = None,
        topk_weights: np.ndarray | None = None,
        bias: list[np.ndarray] | None = None,
        warps: int = 2,
        status: int = 0,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Queue a combine of rows ``y`` (bytes); returns where its results will be."""
        config = self.config
        block, call, announcement = self._start("combine")
        given = Summed(y, fmt, weights, topk_weights, bias or ())
        out, back = fill_combine(call, routes, given, self.windows[_COMBINE], config.num_topk)
        announcement["wire"], announcement["status"] = wire, status
        call["num_blocks"], call["num_threads"] = self.world.blocks, 32 * warps
        call["number"] = self.number = self.number + 1
        routes.fill(block, call)
        record = combine_record(wire, config.hidden, config.num_topk, topk_weights is not None)
        rail.fill_record(block["record"].view(native.dtypes["record"]).reshape(()), record)
        self.queue.append((2, block, warps))
        self.keep += [out, back, bias]
        return out, back


class EmulatedRoutes(RouteArrays):
    """The arrays of a handle."""

    def __init__(self, rank: EmulatedRank, topk_idx: np.ndarray, by_expert: bool) -> None:
        config, topology = rank.config, rank.topology
        self.rank, self.by_expert = rank, by_expert
        super().__init__(topk_idx, config.num_topk, topology.num_ranks, config.num_experts)
        tokens = len(topk_idx)
        shapes = rail.hop_shapes(rank.plan, topology, config, tokens, by_expert=by_expert)
        self.hops = {name: np.full(shape, 77, dtype) for name, (shape, dtype) in shapes.items()}

    def fill(self, block: np.ndarray, call: np.ndarray) -> None:
        """Name the arrays in a parameter block."""
        self.fill_routes(call["routes"].view(self.rank.world.dtypes["routes"]).reshape(()))
        hops = block["hops"].view(self.rank.world.dtypes["hops"]).reshape(())
        addresses = {name: array.ctypes.data for name, array in self.hops.items()}
        rail.fill_hops(
            hops, addresses, self.rank.topology, self.rank.config, by_expert=self.by_expert
        )
