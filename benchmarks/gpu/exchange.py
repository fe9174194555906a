"""A buffer among GPUs with the inputs, routes and rows that calls on it are timed with."""

from dataclasses import dataclass, replace
from functools import lru_cache
from types import TracebackType
from typing import Any, Literal

import torch

from epcomm import Buffer
from epcomm.formats import quantize_fp8
from epcomm.results import CombineResult, DispatchResult, Handle

from ..options import Shape
from ..workload import DRAWN, Inputs, make_inputs, normal_rows

#: What a dispatch is given and what it sends.
Form = Literal["BF16", "FP8 pair", "BF16 to FP8"]
FORMS: tuple[Form, ...] = ("BF16", "FP8 pair", "BF16 to FP8")

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class GpuInputs:
    """What a rank sends. Two of everything, used in turn: together larger than the L2 caches.

    Attributes:
        host: the first of each, on the host.
        rows: bfloat16 [T, H].
        pairs: the same rows as float8_e4m3fn [T, H] and float32 scales.
        topk_idx: int64 [T, K].
        topk_weights: float32 [T, K].
    """

    host: Inputs
    rows: list[torch.Tensor]
    pairs: list[Pair]
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def drawn_rows(shape: Shape) -> torch.Tensor:
    """The rows all ranks draw, bfloat16 [R, min(T, DRAWN), H]: token t has row t mod DRAWN."""
    return _drawn_rows(replace(shape, tokens=min(shape.tokens, DRAWN), routing="uniform"))


@lru_cache(maxsize=2)
def _drawn_rows(shape: Shape) -> torch.Tensor:
    each = [normal_rows(shape, rank, shape.tokens, 1) for rank in range(shape.ranks)]
    return torch.stack(each)


@lru_cache(maxsize=3)
def _gpu_inputs(shape: Shape, rank: int, device: str) -> GpuInputs:
    host = make_inputs(shape, rank)
    codes, scales = quantize_fp8(host.x_TH[:DRAWN].contiguous(), "f32")
    again = torch.arange(shape.tokens) % DRAWN
    codes = codes.view(torch.uint8)[again].view(torch.float8_e4m3fn).to(device)
    scales, rows = scales[again].to(device), host.x_TH.to(device)
    # Tokens moved on by one are other rows for the same routes.
    turned = codes.view(torch.uint8).roll(1, 0).view(torch.float8_e4m3fn)
    return GpuInputs(
        host=host,
        rows=[rows, rows.roll(1, 0)],
        pairs=[(codes, scales), (turned, scales.roll(1, 0))],
        topk_idx=host.topk_idx_TK.to(device),
        topk_weights=host.topk_weights_TK.to(device),
    )


class Exchange:
    """Calls on one buffer; a context manager. Making it is collective, and so are its calls.

    Attributes:
        comm: the ranks.
        shape: what is exchanged.
        sms: of each rank.
        fabric: what carries records between nodes, as Buffer takes it.
        inputs: of this rank.
        handle: routes for cached calls.
        num_rows: this rank receives.
        copies: (token, rank) rows of all ranks.
        y_MH: rows to combine, in memory of the buffer's.
        out_TH: memory for sums.
    """

    def __init__(
        self,
        comm: Any,
        shape: Shape,
        sms: int,
        timeout: float = 20.0,
        device: Literal["cuda", "cpu"] = "cuda",
        fabric: str = "auto",
        staging: int | None = None,
        timeline: bool = False,
    ) -> None:
        self.comm = comm
        self.shape = shape
        self.sms = sms
        self.fabric = fabric
        # Who the ranks are changes nothing about what one of them draws.
        self.inputs = _gpu_inputs(replace(shape, ranks=1, nodes=1), comm.rank, device)
        self.buffer = Buffer(
            comm,
            hidden=shape.hidden,
            num_experts=shape.experts,
            num_topk=shape.topk,
            max_tokens=shape.tokens,
            ranks_per_node=shape.ranks_per_node,
            backend=device,
            num_sms=sms,
            timeout=timeout,
            fabric=fabric,
            max_staging_bytes=staging,
            timeline=timeline,
        )
        first = self.first("BF16", 0)
        self.handle: Handle = first.handle
        self.num_rows = first.num_rows
        self.rows_R: list[int] = comm.allgather(first.num_rows)
        self.copies = sum(self.rows_R)
        self.y_MH = self.buffer.combine_input(self.handle)
        # Rows of every rank differ, as outputs of experts do.
        self.y_MH.copy_(first.x * self.factor(comm.rank))
        self.out_TH = torch.empty_like(self.inputs.rows[0])

    def factor(self, rank: int) -> float:
        """What ``rank`` multiplies the rows it received with, to combine them."""
        return 1.0 + rank / self.shape.ranks

    def _x(self, form: Form, turn: int) -> torch.Tensor | Pair:
        return (self.inputs.pairs if form == "FP8 pair" else self.inputs.rows)[turn % 2]

    def first(self, form: Form, turn: int) -> DispatchResult:
        """A dispatch that counts and announces."""
        return self.buffer.dispatch(
            self._x(form, turn),
            self.inputs.topk_idx,
            self.inputs.topk_weights,
            quantize="fp8" if form == "BF16 to FP8" else None,
        )

    def cached(self, form: Form, turn: int) -> DispatchResult:
        """A dispatch along the routes of an earlier one."""
        quantize: Literal["fp8"] | None = "fp8" if form == "BF16 to FP8" else None
        return self.buffer.dispatch(self._x(form, turn), handle=self.handle, quantize=quantize)

    def combine(self, turn: int) -> CombineResult:
        """Sum the rows; ``turn`` is for calls that are timed and changes nothing."""
        return self.buffer.combine(self.y_MH, self.handle, out=self.out_TH)

    def synchronize(self) -> None:
        """Wait for this rank's calls."""
        if self.out_TH.is_cuda:
            torch.cuda.synchronize()

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.synchronize()
        if kind is None:
            self.comm.Barrier()  # a peer may still read this rank's memory
        del self.y_MH
        self.buffer.close()
