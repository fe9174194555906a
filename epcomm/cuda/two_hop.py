"""A one-node call's parameter block made a two-hop call's. No CUDA is called here."""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import native
from ..backend import Config
from ..native import combine_record, dispatch_record
from . import abi
from .rail import fill_record

#: Warps of a block, many because they wait for memory; a combine takes as many of them as the
#: kernel for its formats has registers for.
_DISPATCH_WARPS = 16
_COMBINE_WARPS = 20


@dataclass(frozen=True)
class Hops:
    """What a handle keeps for the second hop.

    Attributes:
        arrays: device arrays by field of ``epcomm_cuda_hops``.
        block: that structure.
    """

    arrays: dict[str, torch.Tensor]
    block: np.ndarray


class _Block:
    """A two-hop call's parameters, filled in part by part."""

    def __init__(self, name: str, rail: np.ndarray) -> None:
        self.array = np.zeros((), abi.dtypes[f"two_hop_{name}"])
        self.put("rail", *_bytes_of(rail))

    def put(self, field: str, address: int, nbytes: int) -> None:
        """Copy a part there."""
        offset = self.array.dtype.fields[field][1]
        ctypes.memmove(self.array.ctypes.data + offset, address, nbytes)


def _bytes_of(array: np.ndarray) -> tuple[int, int]:
    return array.ctypes.data, array.nbytes


class TwoHopBlocks:
    """The parameters of the two-hop kernels, one block for each kernel.

    Args:
        config: of the buffer.
        rail: ``epcomm_cuda_rail``, the same for all calls.
    """

    def __init__(self, config: Config, rail: np.ndarray) -> None:
        self._config = config
        self._blocks = {name: _Block(name, rail) for name in ("layout", "dispatch", "combine")}
        self._no_hops = np.zeros((), abi.dtypes["hops"])
        self._records: dict[tuple[str, int, bool], np.ndarray] = {}

    def extend(self, name: str, call: Any, hops: Hops | None) -> int:
        """Make a one-node call's parameters a two-hop call's; returns their address.

        They stand until the next call of the same name. ``hops`` is None where the call is a
        refusal, which moves nothing.
        """
        call.routes.max_dests = self._config.num_topk
        if hops is not None and name == "dispatch":
            call.num_warps = _DISPATCH_WARPS
        if hops is not None and name == "combine":
            call.num_threads = 32 * _COMBINE_WARPS
        block = self._blocks[name]
        block.put("call", ctypes.addressof(call), ctypes.sizeof(call))
        block.put("hops", *_bytes_of(self._no_hops if hops is None else hops.block))
        if name != "layout":
            block.put("record", *_bytes_of(self._record(name, call.announcement)))
        if name == "dispatch":
            block.array["forward_list"] = not call.announce
        return block.array.ctypes.data

    def _record(self, name: str, announcement: Any) -> np.ndarray:
        """``epcomm_record`` of a call."""
        fmt = announcement.format if name == "dispatch" else announcement.wire
        key = (name, fmt, bool(announcement.with_weights))
        if key not in self._records:
            hidden, num_topk = self._config.hidden, self._config.num_topk
            self._records[key] = np.zeros((), native.dtypes["record"])
            if name == "dispatch":
                record = dispatch_record(fmt, hidden, num_topk)
            else:
                record = combine_record(fmt, hidden, num_topk, key[2])
            fill_record(self._records[key], record)
        return self._records[key]
