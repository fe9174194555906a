"""What a Buffer asks of a back end. Arguments reach it checked, except the top-k ids."""

from dataclasses import dataclass
from typing import Protocol

import torch

from .clocks import HostClock
from .formats.wire import WireFormat
from .results import CombineResult, DispatchResult, Handle, Layout
from .timeline import Trace
from .topology import Topology


@dataclass(frozen=True)
class Config:
    """What a Buffer was made for; the same on every rank.

    Attributes:
        hidden: H, elements of a row.
        num_experts: E, over all ranks; rank r holds experts r * E/R ... (r+1) * E/R - 1.
        num_topk: K.
        max_tokens: most tokens a rank sends in a call.
        device: where tensors are: "cpu" or "cuda"; once a rank knows its GPU, "cuda:0" or so.
        max_staging_bytes: most bytes of staging between nodes, in and out; None: what all records
            of a call take.
    """

    hidden: int
    num_experts: int
    num_topk: int
    max_tokens: int
    device: str = "cpu"
    max_staging_bytes: int | None = None


@dataclass(frozen=True)
class Options:
    """How a Buffer runs on this rank; may differ between ranks.

    Attributes:
        timeout: seconds a peer may stay silent.
        num_threads: threads of this rank.
        own_core: whether the host has a core for each of its ranks, so that waits may spin.
        num_sms: "cuda": SMs a call uses; None: chosen.
        fabric: what carries messages between nodes, as Buffer's argument; the same on all ranks.
        timeline: the host's clock, where a timeline is wanted; on all ranks or none.
    """

    timeout: float
    num_threads: int
    own_core: bool
    num_sms: int | None = None
    fabric: str = "auto"
    timeline: HostClock | None = None


@dataclass(slots=True)
class DispatchCall:
    """One dispatch: what the user passed, checked.

    Attributes:
        x: [T, H].
        scales: for a packed pair, contiguous [T, ...].
        format: of the rows that travel.
        topk_idx: [T, K] int32 or int64; None with a handle.
        topk_weights: float32 [T, K] or None.
        async_op: the caller waits for the result's event himself.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    format: WireFormat
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    layout: Layout
    alignment: int
    fixed_rows: int | None
    handle: Handle | None
    async_op: bool = False


@dataclass(slots=True)
class CombineCall:
    """One combine: what the user passed, checked.

    Attributes:
        x: [M, H] bfloat16 or float32.
        weights: float32 [M] or None.
        topk_weights: float32 [M, K] ([M] in layout expert) or None.
        bias: up to two tensors like the result.
        wire: format of the records between nodes.
        out: the result's memory, or None.
        async_op: the caller waits for the result's event himself.
    """

    x: torch.Tensor
    handle: Handle
    weights: torch.Tensor | None
    topk_weights: torch.Tensor | None
    bias: tuple[torch.Tensor, ...]
    wire: WireFormat
    out: torch.Tensor | None
    async_op: bool = False


class Backend(Protocol):
    """Moves tokens. Only making it, ``dispatch``, ``combine`` and ``refuse`` are collective."""

    topology: Topology
    device: torch.device  # where tensors of a call are

    def dispatch(self, call: DispatchCall) -> DispatchResult:
        """Raises ValueError for bad ids (after telling the peers), else as Buffer.dispatch."""

    def combine(self, call: CombineCall) -> CombineResult:
        """As Buffer.combine."""

    def refuse(self, operation: str, error: Exception) -> None:
        """Take part in a call whose arguments were refused here, so that no peer waits."""

    def timeline(self, *, restart: bool) -> Trace:
        """As Buffer.timeline, which has made sure that there is one."""

    def check(self) -> None:
        """As Buffer.check."""

    def combine_input(self, handle: Handle, dtype: torch.dtype) -> torch.Tensor:
        """Memory that a combine reads in place, [M, H]."""

    def close(self) -> None:
        """Let go of memory; local, never waits."""
