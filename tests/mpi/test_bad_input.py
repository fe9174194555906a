"""A bad argument on one rank: a clear error there, PeerError elsewhere, and the buffer lives on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import Case, check, make_buffer, nodes_of
from refusals import CASE, arguments, expect, rows

import epcomm


@dataclass(frozen=True)
class Bad:
    """Changed arguments, the error they cause, and words its message must hold."""

    change: Callable[[dict[str, Any]], dict[str, Any]]
    kind: type[Exception]
    words: tuple[str, ...]


def pick(comm: Any, table: dict[str, Bad], name: str) -> tuple[int, Case]:
    """A bad rank and a node shape that rotate through the table."""
    index = list(table).index(name)
    shapes = nodes_of(comm.size)
    shape = shapes[index % len(shapes)]
    return index % comm.size, Case(**{**vars(CASE), "ranks_per_node": shape, "seed": index})


def tokens(a: dict[str, Any]) -> int:
    return len(a["x"])


def ids(*values: list[int]) -> dict[str, Any]:
    """One token per list of choices, with rows and weights to match."""
    return {
        "x": rows(len(values)),
        "topk_idx": torch.tensor(values),
        "topk_weights": torch.ones(len(values), CASE.num_topk),
    }


def fp8(count: int, hidden: int = CASE.hidden) -> torch.Tensor:
    return torch.zeros(count, hidden, dtype=torch.float8_e4m3fn)


DISPATCH = {
    "x no tensor": Bad(lambda a: {"x": a["x"].float().numpy()}, TypeError, ("x:", "ndarray")),
    "x of half": Bad(
        lambda a: {"x": a["x"].half()}, TypeError, ("x:", "bfloat16 or float32", "float16")
    ),
    "x of three axes": Bad(lambda a: {"x": a["x"][None]}, ValueError, ("x:", "[*, 48]", "[1, ")),
    "x of another hidden": Bad(
        lambda a: {"x": rows(tokens(a), 64)}, ValueError, ("x:", "[*, 48]", "64]")
    ),
    "x on another device": Bad(
        lambda a: {"x": a["x"].to("meta")}, ValueError, ("x:", "on cpu", "on meta")
    ),
    "x transposed": Bad(
        lambda a: {**ids([0, 1], [1, 0]), "x": torch.zeros(48, 2, dtype=torch.bfloat16).T},
        ValueError,
        ("x:", "contiguous", "[1, 2]"),
    ),
    "too many tokens": Bad(
        lambda a: ids(*[[0, 1]] * 6), ValueError, ("x:", "6 tokens", "max_tokens=5")
    ),
    "a triple": Bad(lambda a: {"x": (a["x"],) * 3}, TypeError, ("x:", "pair", "3")),
    "a pair of bf16": Bad(lambda a: {"x": (a["x"], a["x"])}, TypeError, ("x[0]:", "float8_e4m3fn")),
    "scales of another type": Bad(
        lambda a: {"x": (fp8(tokens(a)), torch.zeros(tokens(a), 1, dtype=torch.float64))},
        TypeError,
        ("x[1] (scales):", "float32 or int32", "float64"),
    ),
    "scales no tensor": Bad(
        lambda a: {"x": (fp8(tokens(a)), 1.0)}, TypeError, ("x[1] (scales):", "float")
    ),
    "too many scales": Bad(
        lambda a: {"x": (fp8(tokens(a)), torch.zeros(tokens(a), 2))},
        ValueError,
        ("x[1] (scales):", ", 1]", ", 2]"),
    ),
    "packed pair to pack again": Bad(
        lambda a: {"x": (fp8(tokens(a)), torch.zeros(tokens(a), 1)), "quantize": "fp8"},
        ValueError,
        ("quantize:", "'fp8'", "packed already"),
    ),
    "unknown quantize": Bad(
        lambda a: {"quantize": "int8"}, ValueError, ("quantize:", "'int8'", "fp8_ue8m0")
    ),
    "quantize unhashable": Bad(
        lambda a: {"quantize": ["fp8"]}, ValueError, ("quantize:", "['fp8']")
    ),
    "no topk_idx": Bad(lambda a: {"topk_idx": None}, TypeError, ("topk_idx:", "NoneType")),
    "topk_idx of floats": Bad(
        lambda a: {"topk_idx": a["topk_idx"].float()}, TypeError, ("topk_idx:", "int64", "float32")
    ),
    "topk_idx too wide": Bad(
        lambda a: {"topk_idx": torch.zeros(tokens(a), 3, dtype=torch.int64)},
        ValueError,
        ("topk_idx:", ", 2]", ", 3]"),
    ),
    "topk_idx too long": Bad(
        lambda a: {"topk_idx": torch.zeros(tokens(a) + 1, 2, dtype=torch.int64)},
        ValueError,
        ("topk_idx:", "expected shape"),
    ),
    "topk_idx on another device": Bad(
        lambda a: {"topk_idx": a["topk_idx"].to("meta")}, ValueError, ("topk_idx:", "meta")
    ),
    "topk_idx transposed": Bad(
        lambda a: {**ids([0, 1], [1, 0]), "topk_idx": torch.tensor([[0, 1], [1, 0]]).T},
        ValueError,
        ("topk_idx:", "contiguous"),
    ),
    "expert too large": Bad(
        lambda a: ids([0, 1], [0, 99]), ValueError, ("topk_idx[1, 1] is 99", "0..")
    ),
    "expert one too large": Bad(
        lambda a: ids([0, a["num_experts"]]), ValueError, ("topk_idx[0, 1]", "or -1")
    ),
    "expert below -1": Bad(lambda a: ids([-2, 0]), ValueError, ("topk_idx[0, 0] is -2", "-1")),
    "expert twice": Bad(
        lambda a: ids([0, 1], [1, 1]), ValueError, ("topk_idx:", "expert 1", "twice", "row 1")
    ),
    "topk_weights of double": Bad(
        lambda a: {"topk_weights": a["topk_weights"].double()},
        TypeError,
        ("topk_weights:", "float32", "float64"),
    ),
    "topk_weights too wide": Bad(
        lambda a: {"topk_weights": torch.zeros(tokens(a), 3)},
        ValueError,
        ("topk_weights:", ", 2]", ", 3]"),
    ),
    "topk_weights on another device": Bad(
        lambda a: {"topk_weights": a["topk_weights"].to("meta")},
        ValueError,
        ("topk_weights:", "meta"),
    ),
    "unknown layout": Bad(
        lambda a: {"layout": "token"}, ValueError, ("layout:", "'token'", "rank")
    ),
    "alignment of rows by rank": Bad(
        lambda a: {"alignment": 8}, ValueError, ("alignment:", "8", "'expert'")
    ),
    "alignment 0": Bad(
        lambda a: {"layout": "expert", "alignment": 0}, ValueError, ("alignment:", "0", "1..")
    ),
    "alignment too large": Bad(
        lambda a: {"layout": "expert", "alignment": 4096}, ValueError, ("alignment:", "1..1024")
    ),
    "alignment no int": Bad(
        lambda a: {"layout": "expert", "alignment": 8.0}, TypeError, ("alignment:", "int", "float")
    ),
    "fixed_rows negative": Bad(
        lambda a: {"fixed_rows": -1}, ValueError, ("fixed_rows:", "-1", "0..")
    ),
    "fixed_rows no int": Bad(
        lambda a: {"fixed_rows": "9"}, TypeError, ("fixed_rows:", "int", "str")
    ),
    "fixed_rows beyond all memory": Bad(
        lambda a: {"fixed_rows": 2**30}, ValueError, ("fixed_rows:", str(2**30))
    ),
    "handle no handle": Bad(
        lambda a: {"topk_idx": None, "handle": "handle"}, TypeError, ("handle:", "Handle", "str")
    ),
}


@pytest.mark.parametrize("name", DISPATCH)
def test_dispatch_refuses(comm, name):
    bad, (bad_rank, case) = DISPATCH[name], pick(comm, DISPATCH, name)
    with make_buffer(comm, case) as buffer:
        given = arguments(case, comm)
        if comm.rank == bad_rank:
            number = {"num_experts": buffer.config.num_experts}
            given.update(bad.change({**given, **number}))
        expect(comm, bad_rank, lambda: buffer.dispatch(**given), bad.kind, bad.words)
        check(comm, case, buffer)


CACHED = {
    "choices beside a handle": Bad(
        lambda a: {"topk_idx": torch.zeros(tokens(a), 2, dtype=torch.int64)},
        ValueError,
        ("topk_idx:", "None", "handle"),
    ),
    "another number of tokens": Bad(
        lambda a: {"x": rows(4), "topk_weights": torch.zeros(4, 2)},
        ValueError,
        ("x: 4 tokens", "the handle's dispatch had"),
    ),
    "released handle": Bad(
        lambda a: a["handle"].release() or {}, ValueError, ("handle:", "released")
    ),
    "handle of another buffer": Bad(
        lambda a: {"handle": a["foreign"]}, ValueError, ("handle:", "another buffer")
    ),
}


@pytest.mark.parametrize("name", CACHED)
def test_cached_dispatch_refuses(comm, name):
    bad, (bad_rank, case) = CACHED[name], pick(comm, CACHED, name)
    with make_buffer(comm, case) as buffer, make_buffer(comm, case) as other:
        given = arguments(case, comm)
        foreign = other.dispatch(**given).handle
        given = {**given, "topk_idx": None, "handle": buffer.dispatch(**given).handle}
        if comm.rank == bad_rank:
            given.update(bad.change({**given, "foreign": foreign}))
        expect(comm, bad_rank, lambda: buffer.dispatch(**given), bad.kind, bad.words)
        check(comm, case, buffer)
        check(comm, case, other)


COMBINE = {
    "x no tensor": Bad(lambda a: {"x": None}, TypeError, ("x:", "torch.Tensor", "NoneType")),
    "x packed": Bad(
        lambda a: {"x": fp8(len(a["x"]))}, TypeError, ("x:", "bfloat16 or float32", "float8_e4m3fn")
    ),
    "a row too many": Bad(
        lambda a: {"x": rows(len(a["x"]) + 1)}, ValueError, ("x:", "expected shape", "48]")
    ),
    "x on another device": Bad(lambda a: {"x": a["x"].to("meta")}, ValueError, ("x:", "meta")),
    "x not contiguous": Bad(
        lambda a: {"x": torch.zeros(len(a["x"]), 96, dtype=torch.bfloat16)[:, ::2]},
        ValueError,
        ("x:", "contiguous"),
    ),
    "weights of double": Bad(
        lambda a: {"weights": torch.zeros(len(a["x"]), dtype=torch.float64)},
        TypeError,
        ("weights:", "float32", "float64"),
    ),
    "a weight too many": Bad(
        lambda a: {"weights": torch.zeros(len(a["x"]) + 1)}, ValueError, ("weights:", "shape")
    ),
    "topk_weights of one axis": Bad(
        lambda a: {"topk_weights": torch.zeros(len(a["x"]))},
        ValueError,
        ("topk_weights:", ", 2]"),
    ),
    "bias of another type": Bad(
        lambda a: {"bias": torch.zeros(a["handle"].num_tokens, 48)},
        TypeError,
        ("bias:", "bfloat16", "float32"),
    ),
    "bias too long": Bad(
        lambda a: {"bias": rows(a["handle"].num_tokens + 1)}, ValueError, ("bias:", "shape")
    ),
    "three biases": Bad(
        lambda a: {"bias": (rows(a["handle"].num_tokens),) * 3}, ValueError, ("bias:", "two", "3")
    ),
    "out of another type": Bad(
        lambda a: {"out": torch.zeros(a["handle"].num_tokens, 48)},
        TypeError,
        ("out:", "bfloat16", "float32"),
    ),
    "out too long": Bad(
        lambda a: {"out": rows(a["handle"].num_tokens + 1)}, ValueError, ("out:", "shape")
    ),
    "unknown wire": Bad(lambda a: {"wire": "fp8"}, ValueError, ("wire:", "'fp8'", "logfmt10")),
    "wire unhashable": Bad(lambda a: {"wire": ["bf16"]}, ValueError, ("wire:", "['bf16']")),
    "handle no handle": Bad(
        lambda a: {"handle": None}, TypeError, ("handle:", "Handle", "NoneType")
    ),
    "released handle": Bad(
        lambda a: a["handle"].release() or {}, ValueError, ("handle:", "released")
    ),
    "handle of another buffer": Bad(
        lambda a: {"handle": a["foreign"]}, ValueError, ("handle:", "another buffer")
    ),
}


@pytest.mark.parametrize("name", COMBINE)
def test_combine_refuses(comm, name):
    bad, (bad_rank, case) = COMBINE[name], pick(comm, COMBINE, name)
    with make_buffer(comm, case) as buffer, make_buffer(comm, case) as other:
        foreign = other.dispatch(**arguments(case, comm)).handle
        recv = buffer.dispatch(**arguments(case, comm))
        given = {"x": recv.x.clone(), "handle": recv.handle}
        if comm.rank == bad_rank:
            given.update(bad.change({**given, "foreign": foreign}))
        expect(comm, bad_rank, lambda: buffer.combine(**given), bad.kind, bad.words)
        check(comm, case, buffer)


def test_two_ranks_refuse_for_their_own_reasons(comm):
    """Every rank keeps its own error; the others learn of both."""
    if comm.size < 3:
        pytest.skip("needs a rank besides the two bad ones")
    with make_buffer(comm, CASE) as buffer:
        given = arguments(CASE, comm)
        bad = {0: (ValueError, {"quantize": "int8"}), 2: (TypeError, {"topk_idx": None})}
        kind, change = bad.get(comm.rank, (epcomm.PeerError, {}))
        with pytest.raises(kind) as caught:
            buffer.dispatch(**{**given, **change})
        if comm.rank not in bad:
            assert caught.value.ranks == (0, 2)
            assert "quantize" in str(caught.value)
            assert "topk_idx" in str(caught.value)
        check(comm, CASE, buffer)


def test_refused_again_and_again(comm):
    """Refusals one after the other, by every rank in turn, leave no trace."""
    with make_buffer(comm, CASE) as buffer:
        given = arguments(CASE, comm)
        for turn in range(3 * comm.size):
            kind = ValueError if turn % comm.size == comm.rank else epcomm.PeerError
            bad = {"layout": "none"} if kind is ValueError else {}
            with pytest.raises(kind):
                buffer.dispatch(**{**given, **bad})
        check(comm, CASE, buffer)


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_fixed_rows_too_few_somewhere(comm, layout):
    """Every rank learns which rank would overflow; nothing is sent."""
    for shape in nodes_of(comm.size):
        case = Case(shape, hidden=48, tokens=(4,), layout=layout)
        with make_buffer(comm, case) as buffer:
            last = comm.size - 1
            topk_idx = torch.full((4, 3), -1)
            topk_idx[:, 0] = last * case.experts_per_rank
            with pytest.raises(
                ValueError, match=rf"fixed_rows: 3 .* rank {last} .* {4 * comm.size}"
            ):
                buffer.dispatch(rows(4), topk_idx, layout=layout, fixed_rows=3)
            check(comm, case, buffer)


def test_hidden_that_fp8_cannot_carry(comm):
    """Rows of 24 elements are whole 16-byte units in BF16, and are not in FP8."""
    case = Case(comm.size, hidden=24, tokens=(3,))
    with make_buffer(comm, case) as buffer:
        given = arguments(case, comm)
        bad_rank = comm.size - 1
        quantize = "fp8" if comm.rank == bad_rank else None
        words = ("x:", "24 bytes", "FP8", "16")
        expect(
            comm, bad_rank, lambda: buffer.dispatch(**given, quantize=quantize), ValueError, words
        )
        check(comm, case, buffer)


def test_closed_buffer(comm):
    """Every use of a closed buffer says so; closing again does nothing."""
    buffer = make_buffer(comm, CASE)
    recv = buffer.dispatch(**arguments(CASE, comm))
    buffer.close()
    buffer.close()
    uses = [
        lambda: buffer.dispatch(**arguments(CASE, comm)),
        lambda: buffer.combine(recv.x, recv.handle),
        lambda: buffer.combine_input(recv.handle),
        lambda: buffer.get_dispatch_layout(arguments(CASE, comm)["topk_idx"]),
        lambda: buffer.topology,
    ]
    for use in uses:
        with pytest.raises(epcomm.BufferClosedError, match="closed"):
            use()


def test_local_calls_refuse_without_peers(comm):
    """get_dispatch_layout and combine_input are local: no other rank is told."""
    with make_buffer(comm, CASE) as buffer:
        recv = buffer.dispatch(**arguments(CASE, comm))
        if comm.rank == 0:
            with pytest.raises(ValueError, match="twice"):
                buffer.get_dispatch_layout(torch.tensor([[0, 0]]))
            with pytest.raises(ValueError, match=r"topk_idx: expected shape \[\*, 2\]"):
                buffer.get_dispatch_layout(torch.tensor([[0]]))
            with pytest.raises(TypeError, match="dtype"):
                buffer.combine_input(recv.handle, torch.float16)
            with pytest.raises(TypeError, match="handle"):
                buffer.combine_input(None)
        check(comm, CASE, buffer)


def test_inputs_that_require_gradients(comm):
    """Router weights usually do; they must travel like any others."""
    with make_buffer(comm, CASE) as buffer:
        given = arguments(CASE, comm)
        weights = given["topk_weights"].clone().requires_grad_()
        x = given["x"].clone().requires_grad_()
        recv = buffer.dispatch(x, given["topk_idx"], weights)
        y = recv.x.clone().requires_grad_()
        row_weights = torch.ones(recv.num_rows, requires_grad=True)
        bias = x.detach().clone().requires_grad_()
        sent_back = recv.topk_weights.clone().requires_grad_()
        back = buffer.combine(
            y, recv.handle, weights=row_weights, topk_weights=sent_back, bias=bias
        )
        kept = torch.where(given["topk_idx"] >= 0, given["topk_weights"], 0.0)
        assert torch.equal(back.topk_weights, kept)
        assert not back.x.requires_grad
        assert not recv.x.requires_grad
        check(comm, CASE, buffer)
