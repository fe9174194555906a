"""Ranks of one node whose kernels run on the host: memory, parameters and launches."""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
from fabrics import aligned
from kernels import Kernels, RankMemory, RouteArrays, Summed, compile_kernels, fill_combine

from epcomm import native
from epcomm.backend import Config
from epcomm.formats.wire import WireFormat
from epcomm.native import constants


@cache
def build(folder: str) -> ctypes.CDLL:
    """Compile the emulated kernels into ``folder``."""
    library = compile_kernels(
        Path(folder) / "libonenode.so", "tests/emulation/one_node.cc", "tests/emulation/quantize.cc"
    )
    library.emulate_packing.argtypes = [ctypes.c_void_p]
    library.emulate_packing.restype = None
    library.wrong_quotients.restype = ctypes.c_int64
    library.emulate_node.argtypes = [ctypes.c_void_p, *[ctypes.c_int32] * 2, ctypes.c_uint64]
    library.emulate_node.restype = None
    return library


class _Launch(ctypes.Structure):
    _fields_ = [
        ("blocks", ctypes.c_int32),
        ("warps", ctypes.c_int32),
        ("layout_warps", ctypes.c_int32),
        ("delay_us", ctypes.c_int32),
        ("dispatch", ctypes.c_void_p),
        ("combine", ctypes.c_void_p),
    ]


class Node:
    """All ranks' memory and launches.

    Args:
        library: of ``build``.
        num_ranks: R.
        config: of the buffer.
        blocks, warps: of a launch.
        layout_warps: of a block that count and place.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        num_ranks: int,
        config: Config,
        *,
        blocks: int = 2,
        warps: int = 2,
        layout_warps: int = 2,
        timeout: float = 60.0,
    ) -> None:
        self.library, self.config = library, config
        self.kernels = Kernels(library)
        self.dtypes, self.constants = self.kernels.dtypes, self.kernels.constants
        self.blocks, self.warps, self.layout_warps = blocks, warps, layout_warps
        self.ranks = [Rank(self, rank, num_ranks) for rank in range(num_ranks)]
        for rank in self.ranks:
            rank.connect(timeout)

    def run(self, seed: int = 0) -> None:
        """Run what every rank has queued, equally many calls, all ranks at once."""
        rng = np.random.default_rng(seed)
        counts = {len(rank.queue) for rank in self.ranks}
        (count,) = counts
        launches = (_Launch * (count * len(self.ranks)))()
        queue = [one for rank in self.ranks for one in rank.queue]
        for launch, (name, call) in zip(launches, queue, strict=True):
            launch.blocks, launch.warps = self.blocks, self.warps
            launch.layout_warps, launch.delay_us = self.layout_warps, int(rng.integers(0, 3000))
            setattr(launch, name, call.ctypes.data)
        self.library.emulate_node(ctypes.addressof(launches), len(self.ranks), count, seed)
        for rank in self.ranks:
            rank.queue.clear()


class Rank(RankMemory):
    """One rank: what Engine holds on a GPU."""

    def __init__(self, node: Node, rank: int, num_ranks: int) -> None:
        self.node, self.rank, self.num_ranks = node, rank, num_ranks
        E = node.config.num_experts
        super().__init__(node.kernels, 1, num_ranks, E)
        self.bins = np.zeros((node.blocks, 1 + num_ranks + E), np.int32)
        self.window, self.exposed = aligned(1 << 21), aligned(1 << 21)
        self.queue: list[tuple[str, np.ndarray]] = []
        self.number = 0

    def connect(self, timeout: float) -> None:
        """Fill in the block that names other ranks' memory."""
        ranks = self.node.ranks
        windows = [[rank.window.ctypes.data, rank.exposed.ctypes.data] for rank in ranks]
        table = np.array(windows, np.uint64)
        world = np.zeros((), self.node.dtypes["world"])
        world["rank"] = world["local_rank"] = self.rank
        world["num_ranks"] = world["num_local"] = self.num_ranks
        world["num_nodes"], world["num_windows"] = 1, 2
        world["num_experts"] = self.node.config.num_experts
        world["num_topk"] = self.node.config.num_topk
        world["timeout_ns"] = int(timeout * 1e9)
        world["node_ranks"][: self.num_ranks] = range(self.num_ranks)
        world["controls"][: self.num_ranks] = [rank.control.ctypes.data for rank in ranks]
        world["windows"] = table.ctypes.data
        world["report"] = self.report_bytes.ctypes.data
        world["block_bins"] = self.bins.ctypes.data
        self.world = world
        self.keep.append(table)

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
        routes: "Routes | None" = None,
        status: int = 0,
    ) -> "Routes":
        """Queue a dispatch; with ``routes`` a cached one."""
        config, d = self.node.config, self.node.dtypes
        cached = routes is not None
        routes = routes or Routes(self, topk_idx, by_expert)
        with_weights = weights is not None
        row = self.node.kernels.row(config, fmt, by_expert=by_expert, with_weights=with_weights)
        call = np.zeros((), d["dispatch"])
        call["world"] = self.world.reshape(1).view(np.uint8)
        announced = call["announcement"].view(native.dtypes["announcement"]).reshape(())
        announced["op"] = constants["OP_CACHED_DISPATCH" if cached else "OP_DISPATCH"]
        announced["format"], announced["layout"] = fmt, int(by_expert)
        announced["alignment"], announced["fixed_rows"] = alignment, fixed_rows
        announced["with_weights"], announced["num_tokens"] = with_weights, len(x)
        announced["window_bytes"], announced["status"] = self.window.nbytes, status
        announced["window_fd"] = 2 + self.num_ranks - self.rank
        self.number += 1
        call["number"] = self.number
        call["row"] = row.reshape(1).view(np.uint8)
        call["routes"] = routes.block.reshape(1).view(np.uint8)
        call["x"], call["row_in_bytes"] = x.ctypes.data, x.shape[1]
        call["scales"] = 0 if scales is None else scales.ctypes.data
        call["topk_weights"] = 0 if weights is None else weights.ctypes.data
        call["input_format"], call["announce"] = input_format, cached
        self.queue.append(("dispatch", call))
        routes.row = row
        self.keep += [x, weights, scales, routes, call]
        return routes

    def combine(
        self,
        routes: "Routes",
        y: np.ndarray,
        fmt: WireFormat,
        *,
        weights: np.ndarray | None = None,
        topk_weights: np.ndarray | None = None,
        bias: list[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Queue a combine of rows ``y`` (bytes); returns where its results will be."""
        call = np.zeros((), self.node.dtypes["combine"])
        call["world"] = self.world.reshape(1).view(np.uint8)
        given = Summed(y, fmt, weights, topk_weights, bias or ())
        out, back = fill_combine(call, routes, given, self.exposed, self.node.config.num_topk)
        self.number += 1
        call["number"] = self.number
        call["routes"] = routes.block.reshape(1).view(np.uint8)
        self.queue.append(("combine", call))
        self.keep += [routes, call, out, back, bias]
        return out, back

    def received(self, routes: "Routes", fixed_rows: int = -1) -> dict[str, np.ndarray]:
        """What lies in this rank's window after a dispatch."""
        rows = fixed_rows if fixed_rows >= 0 else int(routes.rows[self.rank])
        return self.node.kernels.read_window(self.window, routes.row, rows)


class Routes(RouteArrays):
    """The arrays of a handle."""

    def __init__(self, rank: Rank, topk_idx: np.ndarray, by_expert: bool) -> None:
        config = rank.node.config
        num_dests = config.num_topk if by_expert else min(config.num_topk, rank.num_ranks)
        super().__init__(topk_idx, num_dests, rank.num_ranks, config.num_experts)
        self.block = np.zeros((), rank.node.dtypes["routes"])
        self.fill_routes(self.block)
