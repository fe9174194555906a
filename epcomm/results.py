"""What dispatch, combine and get_dispatch_layout return."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch

from .traffic import Traffic

Layout = Literal["rank", "expert"]


class Event:
    """When a call's outputs may be used.

    The CPU back end finishes a call before it returns, so its events are always complete.
    """

    def wait(self) -> None:
        """Make the caller's current stream (CUDA) or thread (CPU) wait for the call."""

    def query(self) -> bool:
        """Whether the call has completed."""
        return True


class Handle:
    """What a dispatch leaves for the calls that follow its routes.

    A handle serves any number of ``combine`` and cached ``dispatch`` calls on the buffer that
    made it, until :meth:`release` or the buffer's ``close``.

    Attributes:
        num_tokens: T, tokens this rank sent.
        num_rows: M, rows of this rank's output (with padding).
        layout: "rank" or "expert".
    """

    def __init__(self, owner: object, state: Any, num_tokens: int, num_rows: int, layout: Layout):
        self._owner = owner
        self._state = state
        self.num_tokens = num_tokens
        self.num_rows = num_rows
        self.layout: Layout = layout

    @property
    def released(self) -> bool:
        """Whether :meth:`release` was called."""
        return self._state is None

    def release(self) -> None:
        """Free what the handle keeps; using it afterwards is a ValueError."""
        self._state = None


@dataclass
class DispatchLayout:
    """Where this rank's tokens go.

    Attributes:
        tokens_per_rank: distinct tokens for each rank, int32 [R].
        tokens_per_node: distinct tokens for each node, int32 [N].
        tokens_per_expert: tokens for each expert, int32 [E].
        is_token_in_rank: bool [T, R].
    """

    tokens_per_rank: torch.Tensor
    tokens_per_node: torch.Tensor
    tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


@dataclass
class Labels:
    """What came with the rows of a dispatch; see DispatchResult."""

    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    source: torch.Tensor
    tokens_per_expert: torch.Tensor


class Finished(Protocol):
    """What a back end knows of a call, and works out when its result is asked."""

    def time_phases(self) -> dict[str, float]:
        """For the result's ``phases``."""

    def count_traffic(self) -> Traffic:
        """For the result's ``traffic``."""


class Received(Finished, Protocol):
    """Of a dispatch."""

    def make_labels(self) -> Labels:
        """For the result's tensors that most callers do not look at."""

    def count_rows(self) -> int:
        """For the result's ``num_rows``."""


@dataclass
class _Call:
    """What every call returns.

    Attributes:
        event: when the tensors may be used.
    """

    event: Event
    _call: Finished = field(repr=False)

    @cached_property
    def phases(self) -> dict[str, float]:
        """Seconds this rank spent in each phase; on CUDA, asking waits for the call."""
        return self._call.time_phases()

    @cached_property
    def traffic(self) -> Traffic:
        """Bytes this rank moved; counted when first asked for."""
        return self._call.count_traffic()


@dataclass
class DispatchResult(_Call):
    """What a rank received.

    Attributes:
        x: rows, [M, H]; bfloat16, float32 or float8_e4m3fn.
        scales: float32 [M, ceil(H/128)] or int32 [M, ceil(H/512)] (UE8M0) for FP8 rows, else None.
        handle: for ``combine`` and cached ``dispatch``.
        event: when the tensors may be used.

    The tensors are views of shared memory that this result and its tensors keep reserved: they
    stay valid as long as any of them lives.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    handle: Handle
    _call: Received = field(repr=False)

    @cached_property
    def _labels(self) -> Labels:
        return self._call.make_labels()

    @property
    def topk_idx(self) -> torch.Tensor | None:
        """Local expert ids, int64 [M, K], -1 if held elsewhere; None in layout "expert"."""
        return self._labels.topk_idx

    @property
    def topk_weights(self) -> torch.Tensor | None:
        """float32 [M, K], 0 where ``topk_idx`` is -1; [M] in layout "expert"; None if not sent."""
        return self._labels.topk_weights

    @property
    def source(self) -> torch.Tensor:
        """(source rank, source token) of each row, int32 [M, 2]; -1 in padding rows."""
        return self._labels.source

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        """Tokens received for each local expert, without padding, int32 [E/R].

        On the host, or on the GPU where the call did not wait for it (CUDA, ``fixed_rows``).
        """
        return self._labels.tokens_per_expert

    @property
    def num_rows(self) -> int:
        """Rows in use: M, or less when ``fixed_rows`` was given.

        Padding of experts counts as in use. With ``fixed_rows`` on CUDA, asking waits for the GPU.
        """
        return self._call.count_rows()


@dataclass
class CombineResult(_Call):
    """What came home.

    Attributes:
        x: sums, [T, H], dtype of the combined rows.
        topk_weights: float32 [T, K], 0 for dropped choices; None if none were passed.
        event: as for a dispatch.
    """

    x: torch.Tensor
    topk_weights: torch.Tensor | None


@dataclass
class MemoryReport:
    """Bytes a Buffer may use on this rank, by purpose.

    Attributes:
        purposes: name -> (bytes at most, what decides it).
    """

    purposes: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Sum over the purposes, bytes."""
        return sum(nbytes for nbytes, _ in self.purposes.values())

    def __str__(self) -> str:
        width = max(len(name) for name in self.purposes)
        lines = [
            f"{name:<{width}}  {nbytes / 2**20:12,.1f} MiB  {why}"
            for name, (nbytes, why) in self.purposes.items()
        ]
        return "\n".join([*lines, f"{'total':<{width}}  {self.total / 2**20:12,.1f} MiB"])
