"""Are the results right? Every exchange is checked before anything on it is timed.

Against the oracle: all metadata, and sampled rows in full, by :mod:`benchmarks.verify`. Besides,
on the GPU, every row and every sum: what a rank must receive is known from the seeds of the others.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from epcomm.formats import quantize_fp8
from epcomm.results import CombineResult, DispatchResult

from ..options import Shape
from ..verify import VerificationError, check_metadata, check_rows, sampled_tokens
from ..workload import DRAWN
from .exchange import FORMS, Exchange, Form, drawn_rows


@dataclass
class _Done:
    received: DispatchResult | None
    y_MH: torch.Tensor
    returned: CombineResult | None


def check_small(comm: Any, shape: Shape, sms: int, fabric: str = "auto") -> None:
    """Every byte of an exchange small enough for the oracle; collective."""
    with Exchange(comm, replace(shape, tokens=24, hidden=272), sms, fabric=fabric) as exchange:
        check(exchange, np.arange(24))


def check(exchange: Exchange, tokens: np.ndarray | None = None) -> None:
    """First and cached dispatch of every form, and combine; collective.

    Args:
        exchange: to check.
        tokens: of every rank, compared with the oracle in full; None: a sample.

    Raises:
        VerificationError: something is wrong.
    """
    shape, comm = exchange.shape, exchange.comm
    if tokens is None:
        tokens = sampled_tokens(shape.tokens)
    exchange.out_TH.fill_(float("nan"))
    returned = exchange.combine(0)
    check_sums(exchange, returned.x, [exchange.factor(rank) for rank in range(shape.ranks)])
    for form in FORMS:
        formatted = replace(shape, dispatch_format="bf16" if form == "BF16" else "fp8")
        received = exchange.first(form, 0)
        done = _Done(received, exchange.y_MH, returned)
        check_metadata(comm, formatted, exchange.inputs.host, done)
        check_rows(comm, formatted, exchange.inputs.host, done, tokens)
        check_every_row(exchange, form, received)
        del done, received
        check_every_row(exchange, form, exchange.cached(form, 0))


def _equal(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare bytes, on the GPU."""
    if got.shape != expected.shape:
        raise VerificationError(f"{name}: {list(got.shape)} instead of {list(expected.shape)}")
    if got.numel() == 0:  # torch does not reinterpret every empty tensor
        return
    differ = (got.view(torch.uint8) != expected.view(torch.uint8)).any(dim=1)
    if bool(differ.any()):
        raise VerificationError(f"{name}: {int(differ.sum())} of {len(differ)} rows differ")


def check_every_row(exchange: Exchange, form: Form, received: DispatchResult) -> None:
    """Compare all received rows with what the ranks in ``source`` drew."""
    shape = exchange.shape
    drawn = drawn_rows(shape)
    rank_M = received.source[:, 0].long()
    row_M = rank_M * drawn.shape[1] + received.source[:, 1].long() % DRAWN
    flat = drawn.flatten(0, 1)
    if form == "BF16":
        _equal(f"rows of {form}", received.x, flat.to(received.x.device)[row_M])
        return
    codes, scales = quantize_fp8(flat, "f32")
    _equal(f"rows of {form}", received.x, codes.view(torch.uint8).to(received.x.device)[row_M])
    assert received.scales is not None
    _equal(f"scales of {form}", received.scales, scales.to(received.x.device)[row_M])


def check_sums(exchange: Exchange, got_TH: torch.Tensor, factors: list[float]) -> None:
    """Compare all sums with those of rows that every rank returned times its factor.

    Sums are float32, in rank order in a node, then in node order, and rounded once; what comes from
    another node is also rounded on its way.
    """
    shape, inputs = exchange.shape, exchange.inputs
    rank_TK = torch.div(inputs.topk_idx, shape.experts_per_rank, rounding_mode="floor")
    total_TH = torch.zeros(got_TH.shape, dtype=torch.float32, device=got_TH.device)
    home = exchange.comm.rank // shape.ranks_per_node
    for node in range(shape.nodes):
        part_TH = torch.zeros_like(total_TH)
        first = node * shape.ranks_per_node
        for rank in range(first, first + shape.ranks_per_node):
            goes_T = (rank_TK == rank).any(dim=1, keepdim=True)
            row_TH = (inputs.rows[0] * factors[rank]).float()
            part_TH = torch.where(goes_T, part_TH + row_TH, part_TH)
        total_TH += part_TH if node == home else part_TH.bfloat16().float()
    differ = (got_TH != total_TH.bfloat16()).any(dim=1)
    if bool(differ.any()):
        raise VerificationError(f"sums: {int(differ.sum())} of {len(differ)} rows differ")
