"""Memory of results, handles and buffers: kept while used, reused afterwards, never leaked."""

import gc
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import (
    Case,
    assert_combined,
    assert_received,
    check,
    draw_inputs,
    draw_outputs,
    make_buffer,
    make_world,
    nodes_of,
    wire_of,
)

import epcomm
from epcomm import oracle

CASE = Case(1, hidden=48, experts_per_rank=2, num_topk=2, tokens=(7, 0, 12))


def of_shape(comm: Any, index: int, **change: Any) -> Case:
    shapes = nodes_of(comm.size)
    return replace(CASE, ranks_per_node=shapes[index % len(shapes)], **change)


def dispatch(comm: Any, case: Case, buffer: epcomm.Buffer) -> epcomm.DispatchResult:
    given = draw_inputs(case, comm.size)[comm.rank]
    return buffer.dispatch(
        given.x, given.topk_idx, given.topk_weights, layout=case.layout, alignment=case.alignment
    )


def windows(buffer: epcomm.Buffer) -> int:
    """Windows this rank has made."""
    return len(buffer._backend.node.windows._made)


def mappings() -> int:
    """Mappings of segments in this process."""
    return Path("/proc/self/maps").read_text().count("epcomm-")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_results_keep_their_values_while_others_come(comm):
    """Twelve dispatches and combines alive at once, checked after all have run."""
    for index in range(len(nodes_of(comm.size))):
        case = of_shape(comm, index)
        with make_buffer(comm, case) as buffer:
            kept = []
            for seed in range(12):
                one = replace(case, seed=seed)
                recv = dispatch(comm, one, buffer)
                kept.append((one, recv, buffer.combine(recv.x, recv.handle)))
            for one, recv, back in kept:
                inputs, world = draw_inputs(one, comm.size), make_world(one, comm.size)
                received = oracle.dispatch(inputs, world)
                assert_received(recv, received[comm.rank])
                outputs = [
                    oracle.Outputs(torch.from_numpy(r.payload).view(torch.bfloat16))
                    for r in received
                ]
                sums = oracle.combine(outputs, received, inputs, world, wire_of(one))
                assert_combined(back, sums[comm.rank])


def test_any_tensor_of_a_result_keeps_its_window(comm):
    """The last tensor alone must hold the memory, also a view of it."""
    case = of_shape(comm, 0, tokens=(9,))
    with make_buffer(comm, case) as buffer:
        recv = dispatch(comm, case, buffer)
        view, want = recv.source[1:, 1], recv.source[1:, 1].clone()
        row = recv.x[:1].numpy(force=True) if recv.x.dtype == torch.float32 else recv.x[:1]
        want_row = row.clone()
        del recv
        for seed in range(1, 6):
            later = dispatch(comm, replace(case, seed=seed), buffer)
            buffer.combine(later.x, later.handle)
        assert torch.equal(view, want)
        assert torch.equal(row, want_row)


def test_windows_are_reused(comm):
    """Fifty calls whose results are dropped need no more windows than the first few."""
    case = of_shape(comm, 1)
    with make_buffer(comm, case) as buffer:
        for call in range(50):
            recv = dispatch(comm, replace(case, seed=call), buffer)
            buffer.combine(recv.x.clone(), recv.handle, weights=torch.ones(len(recv.x)))
            if call == 4:
                made, mapped = windows(buffer), mappings()
        assert windows(buffer) == made
        assert mappings() == mapped


def test_results_outlive_the_buffer(comm):
    case = of_shape(comm, 2)
    buffer = make_buffer(comm, case)
    recv = dispatch(comm, case, buffer)
    back = buffer.combine(recv.x, recv.handle)
    saved, sums = recv.x.clone(), back.x.clone()
    buffer.close()
    del buffer
    gc.collect()
    comm.Barrier()
    check(comm, case)
    assert torch.equal(recv.x, saved)
    assert torch.equal(back.x, sums)


def test_many_buffers_leak_nothing(comm):
    """Made, used and closed a hundred times: descriptors and mappings stay as they were."""
    case = of_shape(comm, 1, tokens=(2,))

    def once() -> None:
        with make_buffer(comm, case, num_threads=2) as buffer:
            recv = dispatch(comm, case, buffer)
            buffer.combine(recv.x, recv.handle)

    for _ in range(5):
        once()
    gc.collect()
    before = descriptors(), mappings()
    for _ in range(95):
        once()
    gc.collect()
    after = descriptors(), mappings()
    assert after[1] <= before[1]
    assert after[0] <= before[0] + 5  # MPI may keep a few of its own


def test_dropped_buffer_is_closed(comm):
    """A buffer that is forgotten instead of closed gives its memory back too."""
    gc.collect()
    before = mappings()
    buffer = make_buffer(comm, CASE)
    recv = dispatch(comm, CASE, buffer)
    comm.Barrier()
    del buffer, recv
    gc.collect()
    assert mappings() <= before


def test_two_buffers_in_turn(comm):
    small, large = of_shape(comm, 0), of_shape(comm, 1, hidden=208, num_topk=1, layout="expert")
    with make_buffer(comm, small) as one, make_buffer(comm, large) as other:
        for seed in range(4):
            check(comm, replace(small, seed=seed), one)
            check(comm, replace(large, seed=seed), other)


def test_handles_in_any_order(comm):
    """Several routes at once: go back along them in another order, more than once."""
    for index in range(len(nodes_of(comm.size))):
        cases = [of_shape(comm, index, seed=seed, dtype=torch.float32) for seed in range(4)]
        with make_buffer(comm, cases[0]) as buffer:
            received = [dispatch(comm, case, buffer) for case in cases]
            copies = [recv.x.clone() for recv in received]
            for i in (2, 0, 3, 1, 2, 2, 0):
                case, recv = cases[i], received[i]
                given = draw_inputs(case, comm.size)[comm.rank]
                topk_idx = given.topk_idx
                ranks = torch.where(topk_idx >= 0, topk_idx // case.experts_per_rank, -1)
                count = torch.tensor([len(set(row) - {-1}) for row in ranks.tolist()])
                back = buffer.combine(copies[i], recv.handle).x
                assert torch.allclose(back, given.x * count.reshape(-1, 1), rtol=1e-6)
                again = buffer.dispatch(given.x, handle=recv.handle)
                assert torch.equal(again.x, copies[i])


def test_one_handle_many_times(comm):
    case = of_shape(comm, 1, layout="expert", alignment=4)
    with make_buffer(comm, case) as buffer:
        recv = dispatch(comm, case, buffer)
        first = buffer.combine(recv.x, recv.handle).x.clone()
        for _ in range(20):
            assert torch.equal(buffer.combine(recv.x, recv.handle).x, first)
        recv.handle.release()
        assert recv.handle.released
        check(comm, case, buffer)


def test_combine_input_saves_a_copy_and_changes_nothing(comm):
    """Rows written in epcomm's memory, rows copied, and recv.x itself give the same sums."""
    for index in range(len(nodes_of(comm.size))):
        for dtype in (torch.bfloat16, torch.float32):
            case = of_shape(comm, index, dtype=dtype)
            with make_buffer(comm, case) as buffer:
                recv = dispatch(comm, case, buffer)
                made = windows(buffer)
                direct = buffer.combine(recv.x, recv.handle).x
                assert windows(buffer) <= made + 1  # the result's
                place = buffer.combine_input(recv.handle, dtype)
                place.copy_(recv.x)
                in_place = buffer.combine(place, recv.handle).x
                copied = buffer.combine(recv.x.clone(), recv.handle).x
                assert torch.equal(direct, copied)
                assert torch.equal(in_place, copied)
                weights = torch.full((len(place),), 0.5)
                half = buffer.combine(place, recv.handle, weights=weights).x
                assert torch.equal(
                    half, buffer.combine(copied_rows(recv), recv.handle, weights=weights).x
                )


def copied_rows(recv: epcomm.DispatchResult) -> torch.Tensor:
    return recv.x.clone()


def test_input_may_change_after_combine(comm):
    """Combine returns when every rank has read this rank's rows."""
    case = of_shape(comm, 1, tokens=(40,), dtype=torch.float32)
    with make_buffer(comm, case) as buffer:
        recv = dispatch(comm, case, buffer)
        place = buffer.combine_input(recv.handle, torch.float32)
        want = buffer.combine(recv.x, recv.handle).x.clone()
        for turn in range(10):
            if comm.rank == turn % comm.size:
                time.sleep(0.01)
            place.copy_(recv.x)
            got = buffer.combine(place, recv.handle).x
            place.fill_(float("nan"))
            assert torch.equal(got, want)


def test_out_is_written_and_returned(comm):
    case = of_shape(comm, 1)
    with make_buffer(comm, case) as buffer:
        recv = dispatch(comm, case, buffer)
        want = buffer.combine(recv.x, recv.handle).x
        tokens = recv.handle.num_tokens
        wide = torch.full((tokens + 2, case.hidden), -7.0, dtype=torch.bfloat16)
        out = wide[1:-1]
        got = buffer.combine(recv.x, recv.handle, out=out)
        assert got.x is out
        assert torch.equal(out, want)
        assert (wide[0] == -7).all()
        assert (wide[-1] == -7).all()


def test_weights_on_some_ranks_only(comm):
    """Row weights may differ between ranks, also in being there."""
    case = of_shape(comm, 1, row_weights=True, dtype=torch.float32)
    inputs, world = draw_inputs(case, comm.size), make_world(case, comm.size)
    received = oracle.dispatch(inputs, world)
    outputs = draw_outputs(case, received, inputs)
    for rank, given in enumerate(outputs):
        given.topk_weights = None
        if rank % 2:
            given.weights = None
    want = oracle.combine(outputs, received, inputs, world, wire_of(case))[comm.rank]
    with make_buffer(comm, case) as buffer:
        recv = dispatch(comm, case, buffer)
        mine = outputs[comm.rank]
        assert_combined(buffer.combine(mine.y, recv.handle, weights=mine.weights), want)


def test_two_hundred_calls_of_changing_size(comm):
    """Ranks drift apart at random; every result equals the oracle."""
    rng, drift = random.Random(5), random.Random(comm.rank)
    shapes = nodes_of(comm.size)
    shape = shapes[len(shapes) // 2]
    base = Case(shape, hidden=16, experts_per_rank=2, num_topk=2, tokens=(6,))
    with make_buffer(comm, base, timeout=60.0) as buffer:
        for call in range(67):  # of three operations each
            case = replace(
                base,
                tokens=tuple(rng.randrange(7) for _ in range(comm.size)),
                routing=rng.choice(["uniform", "skewed", "one rank", "sparse"]),
                layout=rng.choice(["rank", "expert"]),
                quantize=rng.choice([None, "fp8"]),
                with_weights=rng.random() < 0.5,
                seed=call,
            )
            time.sleep(drift.choice([0, 0, 0, 0.003]))
            check(comm, case, buffer)
    np.testing.assert_equal(buffer._backend, None)
