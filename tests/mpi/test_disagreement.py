"""Ranks that pass different arguments, or call different operations: MismatchError everywhere."""

import numpy as np
import pytest
import torch
from harness import Case, check, make_buffer, nodes_of
from refusals import CASE, arguments, expect_mismatch

DIFFERENT = {
    "format": (lambda a: {"x": a["x"].float()}, ("format", "f32", "bf16")),
    "layout": (lambda a: {"layout": "expert"}, ("layout", "rank", "expert")),
    "alignment": (lambda a: {"layout": "expert", "alignment": 2}, ("layout",)),
    "fixed_rows": (lambda a: {"fixed_rows": 200}, ("fixed_rows", "200")),
    "weights or none": (lambda a: {"topk_weights": None}, ("weights",)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_dispatch_arguments_differ(comm, name):
    if comm.size == 1:
        pytest.skip("one rank cannot disagree")
    change, words = DIFFERENT[name]
    index = list(DIFFERENT).index(name)
    shapes = nodes_of(comm.size)
    for odd in range(comm.size):
        case = Case(**{**vars(CASE), "ranks_per_node": shapes[(index + odd) % len(shapes)]})
        with make_buffer(comm, case) as buffer:
            given = arguments(case, comm)
            if comm.rank == odd:
                given.update(change(given))
            expect_mismatch(comm, odd, lambda b=buffer, g=given: b.dispatch(**g), *words)
            check(comm, case, buffer)


def test_alignment_differs(comm):
    if comm.size == 1:
        pytest.skip("one rank cannot disagree")
    odd = comm.size - 1
    with make_buffer(comm, CASE) as buffer:
        given = arguments(CASE, comm)
        alignment = 8 if comm.rank == odd else 4
        call = lambda: buffer.dispatch(**given, layout="expert", alignment=alignment)  # noqa: E731
        expect_mismatch(comm, odd, call, "alignment", "8", "4")
        check(comm, CASE, buffer)


def test_operation_differs(comm):
    """One rank combines while the others dispatch."""
    if comm.size == 1:
        pytest.skip("one rank cannot disagree")
    for odd in range(comm.size):
        case = Case(**{**vars(CASE), "ranks_per_node": nodes_of(comm.size)[-1 - odd % 2]})
        with make_buffer(comm, case) as buffer:
            given = arguments(case, comm)
            recv = buffer.dispatch(**given)
            if comm.rank == odd:
                call = lambda b=buffer, r=recv: b.combine(r.x, r.handle)  # noqa: E731
            else:
                call = lambda b=buffer, g=given: b.dispatch(**g)  # noqa: E731
            expect_mismatch(comm, odd, call, "operation", "combine", "dispatch")
            check(comm, case, buffer)


def test_handle_differs(comm):
    """One rank goes back along another dispatch than the others."""
    if comm.size == 1:
        pytest.skip("one rank cannot disagree")
    odd = comm.size // 2
    with make_buffer(comm, CASE) as buffer:
        given = arguments(CASE, comm)
        first, second = buffer.dispatch(**given), buffer.dispatch(**given)
        recv = second if comm.rank == odd else first
        expect_mismatch(comm, odd, lambda: buffer.combine(recv.x, recv.handle), "handle")
        expect_mismatch(
            comm, odd, lambda: buffer.dispatch(given["x"], handle=recv.handle), "handle"
        )
        np.testing.assert_array_equal(first.x.view(torch.int16), second.x.view(torch.int16))
        check(comm, CASE, buffer)


def test_combine_arguments_differ(comm):
    if comm.size == 1:
        pytest.skip("one rank cannot disagree")
    with make_buffer(comm, CASE) as buffer:
        recv = buffer.dispatch(**arguments(CASE, comm))
        odd = comm.size - 1
        wire = "logfmt8" if comm.rank == odd else None
        expect_mismatch(
            comm, odd, lambda: buffer.combine(recv.x, recv.handle, wire=wire), "wire", "logfmt8"
        )
        y = recv.x.float() if comm.rank == odd else recv.x
        expect_mismatch(comm, odd, lambda: buffer.combine(y, recv.handle), "format", "f32")
        weights = None if comm.rank == odd else recv.topk_weights
        expect_mismatch(
            comm,
            odd,
            lambda: buffer.combine(recv.x, recv.handle, topk_weights=weights),
            "top-k weights",
        )
        check(comm, CASE, buffer)
