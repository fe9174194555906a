"""Ranks of one node whose dispatch kernels run on the host: memory, parameters and launches."""

import ctypes
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from fabrics import aligned

from epcomm import native
from epcomm.backend import Config
from epcomm.formats.wire import WireFormat
from epcomm.native import constants

ROOT = Path(__file__).parents[2]


@cache
def build(folder: str) -> ctypes.CDLL:
    """Compile the emulated kernel into ``folder``."""
    output = Path(folder) / "libonenode.so"
    sources = ("tests/emulation/one_node.cc", "tests/emulation/cuda_emulation.cc",
               "csrc/cuda/describe.cu")  # fmt: skip
    command = [
        *os.environ.get("CXX", "g++").split(),
        *("-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-ffp-contract=off"),
        *("-Wno-attributes", "-Wno-unknown-pragmas", "-DEPCOMM_EMULATED"),
        # No thread-local variable has a constructor; templates would call what does not exist.
        "-fno-extern-tls-init",
        f"-I{ROOT / 'tests/emulation'}",
        f"-I{ROOT / 'csrc/include'}",
        *("-x", "c++", *(str(ROOT / source) for source in sources), "-o", str(output)),
    ]
    subprocess.run(command, check=True, timeout=900)
    library = ctypes.CDLL(str(output))
    library.epcomm_cuda_control_bytes.restype = ctypes.c_int64
    library.epcomm_cuda_window_parts.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    library.emulate_node.argtypes = [ctypes.c_void_p, *[ctypes.c_int32] * 2, ctypes.c_uint64]
    library.emulate_node.restype = None
    return library


class _Launch(ctypes.Structure):
    _fields_ = [
        ("blocks", ctypes.c_int32),
        ("warps", ctypes.c_int32),
        ("layout_warps", ctypes.c_int32),
        ("delay_us", ctypes.c_int32),
        ("call", ctypes.c_void_p),
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
        self.dtypes = {
            name.removeprefix("cuda_"): native.make_dtype(fields, end.offset)
            for name, (*fields, end) in native.read_fields("epcomm_cuda_fields", library).items()
        }
        self.constants = native.read_constants("epcomm_cuda_constants", library)
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
        queue = [call for rank in self.ranks for call in rank.queue]
        for launch, call in zip(launches, queue, strict=True):
            launch.blocks, launch.warps = self.blocks, self.warps
            launch.layout_warps, launch.delay_us = self.layout_warps, int(rng.integers(0, 3000))
            launch.call = call.ctypes.data
        self.library.emulate_node(ctypes.addressof(launches), len(self.ranks), count, seed)
        for rank in self.ranks:
            rank.queue.clear()


class Rank:
    """One rank: what Engine holds on a GPU."""

    def __init__(self, node: Node, rank: int, num_ranks: int) -> None:
        self.node, self.rank, self.num_ranks = node, rank, num_ranks
        d, E = node.dtypes, node.config.num_experts
        self.control = aligned(node.library.epcomm_cuda_control_bytes(1, num_ranks, E))
        offset = d["control"].fields["bad_choice"][1]
        self.control[offset : offset + 4].view(np.int32)[0] = 2**31 - 1
        self.report_bytes = aligned(d["report"].itemsize + 4 * (E // num_ranks))
        self.report = self.report_bytes[: d["report"].itemsize].view(d["report"])[0]
        self.local_expert_rows = self.report_bytes[d["report"].itemsize :].view(np.int32)
        self.bins = np.zeros((node.blocks, 1 + num_ranks + E), np.int32)
        self.window = aligned(1 << 21)
        self.queue: list[np.ndarray] = []
        self.keep: list[Any] = []
        self.number = 0

    def connect(self, timeout: float) -> None:
        """Fill in the block that names other ranks' memory."""
        ranks = self.node.ranks
        table = np.array([[rank.window.ctypes.data] for rank in ranks], np.uint64)
        world = np.zeros((), self.node.dtypes["world"])
        world["rank"] = world["local_rank"] = self.rank
        world["num_ranks"] = world["num_local"] = self.num_ranks
        world["num_nodes"] = world["num_windows"] = 1
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
        row = np.zeros((), d["row"])
        row["row_bytes"] = fmt.payload_bytes(config.hidden)
        row["scale_bytes"] = fmt.scale_bytes(config.hidden)
        row["num_topk"], row["layout"] = config.num_topk, int(by_expert)
        row["with_topk"], row["with_weights"] = 1, weights is not None
        call = np.zeros((), d["dispatch"])
        call["world"] = self.world.reshape(1).view(np.uint8)
        announced = call["announcement"].view(native.dtypes["announcement"]).reshape(())
        announced["op"] = constants["OP_CACHED_DISPATCH" if cached else "OP_DISPATCH"]
        announced["format"], announced["layout"] = fmt, int(by_expert)
        announced["alignment"], announced["fixed_rows"] = alignment, fixed_rows
        announced["with_weights"], announced["num_tokens"] = weights is not None, len(x)
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
        self.queue.append(call)
        routes.row = row
        self.keep += [x, weights, scales, routes, call]
        return routes

    def received(self, routes: "Routes", fixed_rows: int = -1) -> dict[str, np.ndarray]:
        """What lies in this rank's window after a dispatch."""
        K, row = self.node.config.num_topk, routes.row
        rows = fixed_rows if fixed_rows >= 0 else int(routes.rows[self.rank])
        parts = np.zeros((), self.node.dtypes["parts"])
        self.node.library.epcomm_cuda_window_parts(row.ctypes.data, rows, parts.ctypes.data)
        by_expert = bool(row["layout"])

        def part(name: str, width: int, dtype: Any) -> np.ndarray:
            raw = self.window[int(parts[name]) : int(parts[name]) + rows * width]
            return raw.view(dtype).reshape(rows, width // np.dtype(dtype).itemsize)

        return {
            "payload": part("rows", int(row["row_bytes"]), np.uint8),
            "scales": part("scales", int(row["scale_bytes"]), np.uint8),
            "topk_idx": part("topk_idx", 0 if by_expert else 8 * K, np.int64),
            "topk_weights": part("topk_weights", 4 if by_expert else 4 * K, np.float32),
            "source": part("source", 8, np.int32),
        }


class Routes:
    """The arrays of a handle."""

    def __init__(self, rank: Rank, topk_idx: np.ndarray, by_expert: bool) -> None:
        config = rank.node.config
        tokens, local = len(topk_idx), config.num_experts // rank.num_ranks
        num_dests = config.num_topk if by_expert else min(config.num_topk, rank.num_ranks)
        self.topk_idx = np.ascontiguousarray(topk_idx, np.int64)
        self.dests = np.full((tokens, num_dests), 77, np.int64)
        self.rows = np.zeros(rank.num_ranks, np.int32)
        self.group_start = np.zeros(local + 1, np.int32)
        self.group_count = np.zeros(local, np.int32)
        self.verdict = np.full(1, 77, np.int32)
        self.row: Any = None
        self.block = np.zeros((), rank.node.dtypes["routes"])
        for name in ("topk_idx", "dests", "rows", "group_start", "group_count", "verdict"):
            self.block[name] = getattr(self, name).ctypes.data
        self.block["num_tokens"], self.block["max_dests"] = tokens, num_dests
