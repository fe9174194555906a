"""How ranks are grouped into nodes changes the way, not the result."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from harness import Case, draw_inputs, make_buffer, nodes_of

import epcomm
from epcomm.oracle import to_bytes

CASE = Case(1, hidden=144, experts_per_rank=5, num_topk=4, tokens=(13, 0, 29, 5))
QUANTIZE = {"bf16": None, "fp8": "fp8", "ue8m0": "fp8_ue8m0"}


def dispatch(comm, case: Case, buffer: epcomm.Buffer, quantize=None) -> epcomm.DispatchResult:
    given = draw_inputs(case, comm.size)[comm.rank]
    return buffer.dispatch(
        given.x,
        given.topk_idx,
        given.topk_weights,
        quantize=quantize,
        layout=case.layout,
        alignment=case.alignment,
    )


def parts(recv: epcomm.DispatchResult) -> dict[str, np.ndarray]:
    found = {"x": to_bytes(recv.x), "source": recv.source.numpy().copy()}
    for name in ("scales", "topk_idx", "topk_weights", "tokens_per_expert"):
        tensor = getattr(recv, name)
        if tensor is not None:
            found[name] = tensor.numpy().copy()
    found["x"] = found["x"].copy()
    return found


def assert_same(first: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert first.keys() == other.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("name", QUANTIZE)
def test_dispatch_is_the_same_in_every_shape(comm, name, layout):
    first = None
    for shape in nodes_of(comm.size):
        case = replace(
            CASE, ranks_per_node=shape, layout=layout, alignment=4 if layout == "expert" else 1
        )
        with make_buffer(comm, case) as buffer:
            got = parts(dispatch(comm, case, buffer, QUANTIZE[name]))
            first = first or got
            assert_same(first, got)


@pytest.mark.parametrize("wire", ["bf16", "f32", "logfmt10"])
def test_combine_repeats_to_the_bit(comm, wire):
    for shape in nodes_of(comm.size):
        case = replace(CASE, ranks_per_node=shape)
        with make_buffer(comm, case) as buffer, make_buffer(comm, case) as other:
            recv, again = dispatch(comm, case, buffer), dispatch(comm, case, other)
            sums = [buffer.combine(recv.x, recv.handle, wire=wire).x for _ in range(3)]
            sums.append(other.combine(again.x, again.handle, wire=wire).x)
            for one in sums[1:]:
                np.testing.assert_array_equal(to_bytes(sums[0]), to_bytes(one))


def integer_rows(recv: epcomm.DispatchResult, hidden: int) -> torch.Tensor:
    """Small integers that depend on row and rank: float32 sums of them are exact."""
    source = recv.source.to(torch.int64)
    weight = torch.arange(hidden) % 17 + 1
    return ((source[:, :1] * 31 + source[:, 1:] * 7) % 101 * weight).float()


def test_exact_sums_are_the_same_in_every_shape(comm):
    """Integers in float32 add up exactly, in whatever order the nodes do it."""
    first = None
    for shape in nodes_of(comm.size):
        case = replace(CASE, ranks_per_node=shape, dtype=torch.float32)
        with make_buffer(comm, case) as buffer:
            recv = dispatch(comm, case, buffer)
            weights = torch.arange(len(recv.x)).remainder(5).float()
            got = buffer.combine(integer_rows(recv, case.hidden), recv.handle, weights=weights).x
            first = got.clone() if first is None else first
            assert torch.equal(first, got)


@pytest.mark.parametrize(
    ("wire", "step"), [("logfmt8", 2**-2), ("logfmt10", 2**-4), ("bf16", 2**-8)]
)
def test_wire_formats_stay_within_their_error(comm, wire, step):
    """Each node's part is off by at most one step of the format; the own node's not at all.

    LogFMT spreads 2^(bits - 1) - 2 steps over at most 32 octaves, so a step is a factor of
    2^(32 / 126) with 8 bits and 2^(32 / 510) with 10: relative errors below 1/4 and 1/16.
    """
    for shape in nodes_of(comm.size):
        case = replace(CASE, ranks_per_node=shape, dtype=torch.float32)
        with make_buffer(comm, case) as buffer:
            recv = dispatch(comm, case, buffer)
            exact = buffer.combine(recv.x, recv.handle).x
            rounded = buffer.combine(recv.x, recv.handle, wire=wire).x
            magnitude = buffer.combine(recv.x.abs(), recv.handle).x
            assert ((rounded - exact).abs() <= step * magnitude + 1e-6).all()
            if buffer.num_nodes == 1:
                assert torch.equal(rounded, exact)
            elif comm.size > 1 and len(exact):
                assert not torch.equal(rounded, exact)
