"""What ranks have, of one node or of several, whose kernels run on the host.

The kernels are those of csrc/kernels, compiled by the C++ compiler (cuda_emulation.h); each rank's
memory is NumPy's, and all ranks' addresses are one process's.
"""

import ctypes
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fabrics import aligned

from epcomm import native
from epcomm.backend import Config
from epcomm.cpu.window import combine_parts
from epcomm.formats.wire import WireFormat
from epcomm.native import constants

ROOT = Path(__file__).parents[2]


def compile_kernels(output: Path, *sources: str) -> ctypes.CDLL:
    """Compile emulated kernels, with what all of them need, into a library and load it."""
    common = ("tests/emulation/cuda_emulation.cc", "csrc/cuda/describe.cu")
    command = [
        *os.environ.get("CXX", "g++").split(),
        *("-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-ffp-contract=off"),
        *("-Wno-attributes", "-Wno-unknown-pragmas", "-DEPCOMM_EMULATED"),
        # No thread-local variable has a constructor; templates would call what does not exist.
        "-fno-extern-tls-init",
        f"-I{ROOT / 'tests/emulation'}",
        f"-I{ROOT / 'csrc/include'}",
        *("-x", "c++", *(str(ROOT / source) for source in (*sources, *common))),
        *("-o", str(output)),
    ]
    subprocess.run(command, check=True, timeout=900)
    library = ctypes.CDLL(str(output))
    library.epcomm_cuda_control_bytes.restype = ctypes.c_int64
    library.epcomm_cuda_window_parts.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    return library


class Kernels:
    """A library of emulated kernels and their parameter blocks.

    Attributes:
        library: of ``compile_kernels``.
        dtypes: by name, without ``cuda_``.
        constants: by name.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.dtypes = {
            name.removeprefix("cuda_"): native.make_dtype(fields, end.offset)
            for name, (*fields, end) in native.read_fields("epcomm_cuda_fields", library).items()
        }
        self.constants = native.read_constants("epcomm_cuda_constants", library)

    def row(
        self, config: Config, fmt: WireFormat, *, by_expert: bool, with_weights: bool
    ) -> np.ndarray:
        """What a dispatched row consists of."""
        row = np.zeros((), self.dtypes["row"])
        row["row_bytes"] = fmt.payload_bytes(config.hidden)
        row["scale_bytes"] = fmt.scale_bytes(config.hidden)
        row["num_topk"], row["layout"] = config.num_topk, int(by_expert)
        row["with_topk"], row["with_weights"] = 1, with_weights
        return row

    def read_window(self, window: np.ndarray, row: np.ndarray, rows: int) -> dict[str, np.ndarray]:
        """What so many dispatched rows have left in a window."""
        K, by_expert = int(row["num_topk"]), bool(row["layout"])
        parts = np.zeros((), self.dtypes["parts"])
        self.library.epcomm_cuda_window_parts(row.ctypes.data, rows, parts.ctypes.data)

        def part(name: str, width: int, dtype: Any) -> np.ndarray:
            raw = window[int(parts[name]) : int(parts[name]) + rows * width]
            return raw.view(dtype).reshape(rows, width // np.dtype(dtype).itemsize)

        return {
            "payload": part("rows", int(row["row_bytes"]), np.uint8),
            "scales": part("scales", int(row["scale_bytes"]), np.uint8),
            "topk_idx": part("topk_idx", 0 if by_expert else 8 * K, np.int64),
            "topk_weights": part("topk_weights", 4 if by_expert else 4 * K, np.float32),
            "source": part("source", 8, np.int32),
        }


class RankMemory:
    """What a rank's kernels share with the other ranks' and with the host."""

    def __init__(self, kernels: Kernels, num_nodes: int, num_ranks: int, num_experts: int) -> None:
        d = kernels.dtypes
        self.control = aligned(
            kernels.library.epcomm_cuda_control_bytes(num_nodes, num_ranks, num_experts)
        )
        offset = d["control"].fields["bad_choice"][1]
        self.control[offset : offset + 4].view(np.int32)[0] = 2**31 - 1
        self.report_bytes = aligned(d["report"].itemsize + 4 * (num_experts // num_ranks))
        self.report = self.report_bytes[: d["report"].itemsize].view(d["report"])[0]
        self.local_expert_rows = self.report_bytes[d["report"].itemsize :].view(np.int32)
        self.keep: list[Any] = []


@dataclass(frozen=True)
class Summed:
    """What a rank gives to a combine.

    Attributes:
        y: rows, bytes [M, H * element].
        fmt: of the rows.
        weights: of rows, float32 [M].
        topk_weights: to bring home, float32 [M, K] or [M].
        bias: bytes [T, H * element] each.
    """

    y: np.ndarray
    fmt: WireFormat
    weights: np.ndarray | None = None
    topk_weights: np.ndarray | None = None
    bias: Sequence[np.ndarray] = ()


def fill_combine(
    call: np.ndarray, routes: "RouteArrays", given: Summed, window: np.ndarray, num_topk: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Fill in a block ``combine`` for rows that lie in window 1; returns where results will be."""
    by_expert, tokens = bool(routes.row["layout"]), len(routes.topk_idx)
    parts = combine_parts(len(given.y), given.y.shape[1], num_topk, by_expert)
    for array, start in (
        (given.y, parts.x),
        (given.weights, parts.row_weights),
        (given.topk_weights, parts.topk_weights),
    ):
        if array is not None:
            window[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    announcement = call["announcement"].view(native.dtypes["announcement"]).reshape(())
    announcement["op"], announcement["format"] = constants["OP_COMBINE"], given.fmt
    announcement["layout"], announcement["wire"] = int(by_expert), given.fmt
    announcement["with_weights"] = given.topk_weights is not None
    announcement["window_serial"], announcement["row_weights"] = 1, given.weights is not None
    announcement["window_bytes"] = window.nbytes
    announcement["rows_offset"] = parts.x
    announcement["weights_offset"] = parts.row_weights
    announcement["topk_offset"] = parts.topk_weights
    out = np.zeros((tokens, given.y.shape[1]), np.uint8)
    back = None
    if given.topk_weights is not None:
        back = np.full((tokens, num_topk), np.nan, np.float32)
        call["topk_weights"] = back.ctypes.data
    call["bias"][: len(given.bias)] = [b.ctypes.data for b in given.bias]
    call["out"], call["row_bytes"], call["layout"] = out.ctypes.data, out.shape[1], int(by_expert)
    return out, back


class RouteArrays:
    """The arrays of a handle."""

    NAMES = ("topk_idx", "dests", "rows", "group_start", "group_count", "verdict")

    def __init__(
        self, topk_idx: np.ndarray, num_dests: int, num_ranks: int, num_experts: int
    ) -> None:
        local = num_experts // num_ranks
        self.topk_idx = np.ascontiguousarray(topk_idx, np.int64)
        self.dests = np.full((len(topk_idx), num_dests), 77, np.int64)
        self.rows = np.zeros(num_ranks, np.int32)
        self.group_start = np.zeros(local + 1, np.int32)
        self.group_count = np.zeros(local, np.int32)
        self.verdict = np.full(1, 77, np.int32)
        self.row: Any = None

    def fill_routes(self, block: np.ndarray) -> None:
        """Name the arrays in a block ``routes``."""
        for name in self.NAMES:
            block[name] = getattr(self, name).ctypes.data
        block["num_tokens"], block["max_dests"] = self.dests.shape
