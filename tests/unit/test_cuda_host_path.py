"""From a call of a CUDA buffer to the launch of its kernels, with stand-ins for the GPU.

What the kernels make of their parameters is for tests/gpu.
"""

import ctypes
import gc
import itertools

import numpy as np
import pytest
import torch

import epcomm
from epcomm import native
from epcomm.cuda import abi

if not abi.available:
    pytest.skip("libepcomm was built without CUDA", allow_module_level=True)

from cuda_stand_ins import (
    HIDDEN,
    RANKS,
    TOKENS,
    TOPK,
    WORDS,
    choices,
    inputs,
    make_buffer,
)

from epcomm.native import constants

LOCAL = 4  # experts

WEIGHTS = torch.ones(TOKENS, TOPK)


def window_of(buffer, serial):
    """(address, bytes) of a window."""
    block = buffer._backend._engine.windows[serial]
    return block.pointer, block.num_bytes


# Dispatch ----------------------------------------------------------------------------------


def test_first_call_makes_windows_once_all_ranks_ask_for_them(buffer, gpu):
    got = buffer.dispatch(inputs(), choices(), WEIGHTS)
    asked, moved = gpu.launches
    assert asked.name == moved.name == "dispatch"
    assert asked.announcement.window_bytes == 0
    address, num_bytes = window_of(buffer, moved.announcement.window_serial)
    assert moved.announcement.window_bytes == num_bytes
    assert moved.announcement.window_fd == 3  # of four
    assert got.x.data_ptr() == address
    assert (asked.block.number, moved.block.number) == (1, 2)
    buffer.dispatch(inputs(), choices(), WEIGHTS)
    assert len(gpu.launches) == 3


FORMS = {
    "bf16": ({}, "BF16", "BF16"),
    "f32": ({}, "F32", "F32"),
    "pair": ({}, "FP8", "FP8"),
    "ue8m0 pair": ({}, "FP8_UE8M0", "FP8_UE8M0"),
    "packed": ({"quantize": "fp8"}, "BF16", "FP8"),
    "packed by expert": ({"quantize": "fp8_ue8m0", "layout": "expert", "alignment": 4},
                         "BF16", "FP8_UE8M0"),
    "fixed": ({"fixed_rows": 9}, "BF16", "BF16"),
}  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_parameters_of_a_dispatch(buffer, gpu, name, weighted):
    options, given, sent = FORMS[name]
    x, topk_idx = inputs(name), choices()
    weights = WEIGHTS if weighted else None
    buffer.dispatch(inputs(), choices())  # another form's parameters are not left in these
    got = buffer.dispatch(x, topk_idx, weights, **options)
    again = buffer.dispatch(
        x, topk_weights=weights, handle=got.handle, quantize=options.get("quantize")
    )
    first, cached = (launch.block for launch in gpu.launches[-2:])
    routes = got.handle._state.routes
    rows, scales = x if isinstance(x, tuple) else (x, None)
    by_expert = options.get("layout") == "expert"
    for block in (first, cached):
        announced, row = block.announcement, block.row
        assert announced.op == constants["OP_CACHED_DISPATCH" if block is cached else "OP_DISPATCH"]
        assert announced.format == constants[f"FORMAT_{sent}"]
        assert announced.layout == constants["LAYOUT_EXPERT" if by_expert else "LAYOUT_RANK"]
        assert announced.alignment == options.get("alignment", 1)
        assert announced.fixed_rows == options.get("fixed_rows", -1)
        assert announced.with_weights == row.with_weights == weighted
        assert announced.num_tokens == TOKENS
        assert announced.handle_epoch == (routes.number if block is cached else 0)
        assert announced.status == constants["STATUS_OK"]
        assert row.row_bytes == native.library.epcomm_payload_bytes(announced.format, HIDDEN)
        assert row.scale_bytes == native.library.epcomm_scale_bytes(announced.format, HIDDEN)
        assert (row.num_topk, row.layout, row.with_topk) == (TOPK, announced.layout, 1)
        assert block.num_blocks == 16
        assert (block.world.rank, block.world.num_ranks) == (1, RANKS)
        assert bytes(block.routes) == bytes(routes.block)
    assert first.number == cached.number - 1
    for block in (first, cached):
        assert block.x == rows.data_ptr()
        assert (block.scales or 0) == (0 if scales is None else scales.data_ptr())
        assert (block.topk_weights or 0) == (weights.data_ptr() if weighted else 0)
        assert block.row_in_bytes == rows.shape[1] * rows.element_size()
        assert block.input_format == constants[f"FORMAT_{given}"]
        assert block.announce == (block is cached)
        assert block.num_warps == (8 if given == sent else 14)
    serials = {block.announcement.window_serial for block in (first, cached)}
    assert len(serials) == 2  # the first result still holds its own
    assert again.x.shape == got.x.shape == (options.get("fixed_rows", 5), HIDDEN)


@pytest.mark.parametrize(
    ("held", "copies", "hidden", "warps"),
    [(96, 5.25, 7168, 8), (113, 5.25, 7168, 8), (114, 5.25, 7168, 4), (128, 5.25, 7168, 4),
     (128, 3.6, 7168, 8), (132, 4.5, 7168, 4), (132, 4.4, 7168, 8), (128, 5.25, 14336, 4),
     (128, 5.25, 4096, 7), (128, 5.25, 2048, 8)],
)  # fmt: skip
def test_few_warps_move_long_rows_where_copies_need_all_memory(
    monkeypatch, gpu, held, copies, hidden, warps
):
    gpu.copies_of_token = copies
    gpu.sms_of_calls = held
    buffer = make_buffer(monkeypatch, gpu, hidden=hidden)
    x = torch.zeros(TOKENS, hidden, dtype=torch.float8_e4m3fn), torch.zeros(TOKENS, hidden // 128)
    handle = buffer.dispatch(x, choices()).handle
    buffer.dispatch(x, handle=handle)
    first, cached = (launch.block for launch in gpu.launches[-2:])
    # A first call has more to do before rows move.
    assert (first.num_warps, cached.num_warps) == (8, warps)
    buffer.dispatch(torch.zeros(TOKENS, hidden, dtype=torch.bfloat16), handle=handle,
                    quantize="fp8")  # fmt: skip
    assert gpu.launches[-1].block.num_warps == 14


def test_as_many_warps_as_ever_move_rows_without_bulk_copies(monkeypatch, gpu):
    gpu.sms_of_calls, gpu.copies_in_bulk = 128, False
    buffer = make_buffer(monkeypatch, gpu, hidden=7168)
    x = torch.zeros(TOKENS, 7168, dtype=torch.bfloat16)
    buffer.dispatch(x, handle=buffer.dispatch(x, choices()).handle)
    assert gpu.launches[-1].block.num_warps == 8


def test_routes_lie_apart_in_memory_that_handles_keep(buffer, gpu):
    results = [buffer.dispatch(inputs(), choices()) for _ in range(3)]
    spans = []
    for got in results:
        routes = got.handle._state.routes
        block, memory = routes.block, routes.memory
        dests = block.dests
        assert (block.num_tokens, block.max_dests) == (TOKENS, TOPK)
        assert dests % 128 == memory.data_ptr() % 128
        starts = [block.rows, block.group_start, block.group_count, block.verdict]
        sizes = [4 * n for n in (RANKS, LOCAL + 1, LOCAL, 1)]
        assert starts[0] == dests + 8 * TOKENS * TOPK
        for (start, following), size in zip(itertools.pairwise(starts), sizes, strict=False):
            assert start + size == following
        end = starts[-1] + sizes[-1]
        assert memory.data_ptr() <= dests < end <= memory.data_ptr() + memory.nbytes
        spans.append((dests, end))
        counts = np.ctypeslib.as_array((ctypes.c_int32 * LOCAL).from_address(starts[2]))
        counts[:] = [4, 3, 2, 1]
        assert routes.tokens_per_expert.tolist() == [4, 3, 2, 1]
        np.ctypeslib.as_array((ctypes.c_int32 * RANKS).from_address(starts[0]))[:] = range(RANKS)
        assert routes.count_rows() == 1
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_narrow_ids_are_widened(buffer, gpu):
    got = buffer.dispatch(inputs(), choices(torch.int32))
    routes = got.handle._state.routes
    assert routes.topk_idx.dtype == torch.int64
    assert gpu.launches[-1].block.routes.topk_idx == routes.topk_idx.data_ptr()


# Windows and results -----------------------------------------------------------------------


def test_tensors_lie_where_the_kernels_write(buffer, gpu):
    gpu.rows = (5, 7)
    got = buffer.dispatch(inputs("pair"), choices(), WEIGHTS)
    window, _ = window_of(buffer, gpu.launches[-1].announcement.window_serial)
    parts = abi.structures["parts"]()
    row = gpu.launches[-1].block.row
    native.library.epcomm_cuda_window_parts(ctypes.addressof(row), 5, ctypes.addressof(parts))
    for tensor, offset, shape, dtype in (
        (got.x, parts.rows, (5, HIDDEN), torch.float8_e4m3fn),
        (got.scales, parts.scales, (5, WORDS), torch.float32),
        (got.topk_idx, parts.topk_idx, (5, TOPK), torch.int64),
        (got.topk_weights, parts.topk_weights, (5, TOPK), torch.float32),
        (got.source, parts.source, (5, 2), torch.int32),
    ):
        assert tensor.data_ptr() == window + offset
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
    got.source[:] = 3  # and they are that memory, not a copy
    assert ctypes.c_int32.from_address(window + parts.source).value == 3


@pytest.mark.parametrize("kept", ["x", "scales", "topk_idx", "topk_weights", "source"])
def test_a_window_is_lent_while_any_tensor_of_it_lives(buffer, gpu, kept):
    got = buffer.dispatch(inputs("pair"), choices(), WEIGHTS)
    lent = gpu.launches[-1].announcement.window_serial
    view = getattr(got, kept)[1:, :1]
    del got
    gc.collect()
    for _ in range(6):
        buffer.dispatch(inputs("pair"), choices(), WEIGHTS)
        assert gpu.launches[-1].announcement.window_serial != lent
    del view
    serials = []
    held = []
    for _ in range(4):
        held.append(buffer.dispatch(inputs("pair"), choices(), WEIGHTS))
        serials.append(gpu.launches[-1].announcement.window_serial)
    assert lent in serials


def test_a_result_keeps_its_window_for_labels_asked_for_late(buffer, gpu):
    got = buffer.dispatch(inputs(), choices())
    lent = gpu.launches[-1].announcement.window_serial
    got.x = None  # type: ignore[assignment]
    for _ in range(4):
        buffer.dispatch(inputs(), choices())
        assert gpu.launches[-1].announcement.window_serial != lent
    address, num_bytes = window_of(buffer, lent)
    assert address < got.source.data_ptr() < address + num_bytes


def test_results_without_rows_hold_a_window_too(buffer, gpu):
    gpu.rows = (0, 7)
    results = [buffer.dispatch(inputs("pair"), choices()) for _ in range(4)]
    assert [r.x.shape for r in results] == [(0, HIDDEN)] * 4
    assert {tuple(r.source.shape) for r in results} == {(0, 2)}
    serials = [launch.announcement.window_serial for launch in gpu.launches[1:]]
    assert len(set(serials)) == 4


def test_where_all_windows_are_held_all_ranks_make_another(buffer, gpu):
    held = [buffer.dispatch(inputs(), choices()) for _ in range(5)]
    sizes = [launch.announcement.window_bytes > 0 for launch in gpu.launches]
    assert sizes == [False, True, True, True, True, False, True]
    assert len({h.x.data_ptr() for h in held}) == 5


def test_fixed_rows_cannot_ask_for_a_window(buffer, gpu):
    held = [buffer.dispatch(inputs(), choices(), fixed_rows=9) for _ in range(4)]
    with pytest.raises(MemoryError, match="held by an earlier result"):
        buffer.dispatch(inputs(), choices(), fixed_rows=9)
    assert gpu.launches[-1].announcement.status == constants["STATUS_REFUSED"]
    del held
    assert buffer.dispatch(inputs(), choices(), fixed_rows=9).x.shape == (9, HIDDEN)


def test_results_outlive_the_buffer(buffer, gpu):
    got = buffer.dispatch(inputs(), choices())
    event = got.event
    buffer.close()
    assert gpu.events  # of the result
    got.x[:] = 1
    assert got.source.shape == (5, 2)
    del got, event
    assert not gpu.events


def test_counts_of_a_result_are_its_own(buffer, gpu):
    backend = buffer._backend
    backend._engine.local_expert_rows[:] = [3, 1, 0, 1]
    first = buffer.dispatch(inputs(), choices())
    backend._engine.local_expert_rows[:] = 9
    again = buffer.dispatch(inputs(), handle=first.handle)
    assert first.tokens_per_expert.tolist() == [3, 1, 0, 1]
    first.tokens_per_expert[:] = 0
    assert again.tokens_per_expert.tolist() == [3, 1, 0, 1]
    assert again.tokens_per_expert.dtype == torch.int32


# Combine -----------------------------------------------------------------------------------


def test_parameters_of_a_combine(buffer, gpu):
    handle = buffer.dispatch(inputs(), choices(), WEIGHTS).handle
    y = buffer.combine_input(handle)
    bias = tuple(torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16) for _ in range(2))
    weights, topk_weights = torch.ones(5), torch.ones(5, TOPK)
    got = buffer.combine(y, handle, weights=weights, topk_weights=topk_weights, bias=bias)
    block = gpu.launches[-1].block
    announced, routes = block.announcement, handle._state.routes
    window, _ = window_of(buffer, announced.window_serial)
    assert y.data_ptr() == window
    assert announced.op == constants["OP_COMBINE"]
    assert announced.format == announced.wire == constants["FORMAT_BF16"]
    assert (announced.with_weights, announced.row_weights) == (1, 1)
    assert announced.handle_epoch == routes.number
    assert announced.rows_offset == 0
    assert bytes(block.routes) == bytes(routes.block)
    assert (block.out, block.topk_weights) == (got.x.data_ptr(), got.topk_weights.data_ptr())
    assert list(block.bias) == [b.data_ptr() for b in bias]
    assert (block.row_bytes, block.num_threads) == (2 * HIDDEN, 640)
    assert [copy[:3] for copy in gpu.copies] == [
        (window + announced.weights_offset, weights.data_ptr(), 20),
        (window + announced.topk_offset, topk_weights.data_ptr(), 60),
    ]
    # A plain combine along the same lines has none of that.
    out = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16)
    buffer.combine(y, handle, out=out)
    block = gpu.launches[-1].block
    assert (block.announcement.with_weights, block.announcement.row_weights) == (0, 0)
    assert block.out == out.data_ptr()
    assert not any(block.bias)
    assert not block.topk_weights
    assert len(gpu.copies) == 2


def test_parameters_change_with_the_handle_and_come_back(buffer, gpu):
    gpu.free_windows = 9
    handles = [buffer.dispatch(inputs(), choices()).handle for _ in range(2)]
    shorter = inputs()[:2].contiguous()
    handles.append(buffer.dispatch(shorter, choices()[:2].contiguous()).handle)
    y = buffer.combine_input(handles[0])
    bias = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
    for one, added in [(0, None), (1, None), (1, bias), (0, None), (2, None), (0, bias)]:
        handle = handles[one]
        routes = handle._state.routes
        buffer.dispatch(inputs()[: routes.num_tokens].contiguous(), handle=handle)
        cached = gpu.launches[-1]
        buffer.combine(y, handle, bias=None if added is None else added[: routes.num_tokens])
        combined = gpu.launches[-1]
        for launch in (cached, combined):
            assert bytes(launch.block.routes) == bytes(routes.block)
            assert launch.announcement.num_tokens == (2 if one == 2 else TOKENS)
            assert launch.announcement.handle_epoch == routes.number
        address = 0 if added is None else added.data_ptr()
        assert list(combined.block.bias) == [address, 0]
    weights = torch.ones(5)
    offsets = []
    for given in (weights, None, weights):
        buffer.combine(y, handles[0], weights=given)
        announced = gpu.launches[-1].announcement
        offsets.append((announced.row_weights, announced.weights_offset > 0))
    assert offsets == [(1, True), (0, False), (1, True)]


def test_a_window_shows_other_parts_to_another_call(buffer, gpu):
    # Windows take turns, so that each of these calls finds one that the others have used.
    for _ in range(2):
        for form, rows in [("pair", 5), ("bf16", 5), ("pair", 3), ("ue8m0 pair", 3), ("f32", 5)]:
            gpu.rows = (rows, 7)
            got = buffer.dispatch(inputs(form), choices(), WEIGHTS)
            address, _ = window_of(buffer, gpu.launches[-1].announcement.window_serial)
            given = inputs(form)
            x, scales = given if isinstance(given, tuple) else (given, None)
            assert (got.x.data_ptr(), got.x.dtype, got.x.shape) == (
                address,
                x.dtype,
                (rows, HIDDEN),
            )
            assert (got.scales is None) == (scales is None)
            if scales is not None:
                assert (got.scales.dtype, got.scales.shape) == (
                    scales.dtype, (rows, scales.shape[1])
                )  # fmt: skip
                assert got.scales.data_ptr() >= address + rows * HIDDEN
            assert got.topk_idx.shape == (rows, TOPK)
            del got


def test_fixed_rows_of_several_sizes_find_windows(buffer, gpu):
    for fixed_rows in (9, 4, 900, 9, 5000):
        got = buffer.dispatch(inputs(), choices(), fixed_rows=fixed_rows)
        assert got.x.shape == (fixed_rows, HIDDEN)
        address, num_bytes = window_of(buffer, gpu.launches[-1].announcement.window_serial)
        assert got.x.data_ptr() == address
        assert num_bytes >= got.x.nbytes


def test_rows_of_a_dispatch_are_combined_in_place_and_others_copied(buffer, gpu):
    got = buffer.dispatch(inputs(), choices())
    received = gpu.launches[-1].announcement.window_serial
    buffer.combine(got.x, got.handle)
    assert gpu.launches[-1].announcement.window_serial == received
    assert not gpu.copies
    y = torch.zeros(5, HIDDEN, dtype=torch.bfloat16)
    buffer.combine(y, got.handle)
    announced = gpu.launches[-1].announcement
    assert announced.window_serial != received
    window, _ = window_of(buffer, announced.window_serial)
    assert gpu.copies == [(window + announced.rows_offset, y.data_ptr(), y.nbytes, 0)]
    with_weights = torch.ones(5)
    buffer.combine(got.x, got.handle, weights=with_weights)
    # A window has room for weights only where rows begin it and it is large enough.
    announced = gpu.launches[-1].announcement
    assert announced.row_weights == 1
    assert announced.window_serial != received


def test_a_wider_combine_makes_larger_windows(buffer, gpu):
    got = buffer.dispatch(inputs(), choices())
    gpu.rows = (5000, 5000)
    got = buffer.dispatch(inputs(), choices())
    launches = len(gpu.launches)
    buffer.combine(torch.zeros(5000, HIDDEN), got.handle)
    asked, moved = gpu.launches[launches:]
    assert asked.announcement.window_bytes == 0
    assert moved.announcement.window_bytes >= 5000 * HIDDEN * 4


# Refusals ----------------------------------------------------------------------------------


def test_refused_arguments_are_announced_with_the_reason(buffer, gpu):
    handle = buffer.dispatch(inputs(), choices()).handle
    with pytest.raises(TypeError, match="topk_idx"):
        buffer.dispatch(inputs(), choices().float())
    refused = gpu.launches[-1]
    assert refused.name == "dispatch"
    assert refused.announcement.op == constants["OP_DISPATCH"]
    assert refused.announcement.status == constants["STATUS_REFUSED"]
    assert refused.announcement.reason.startswith(b"topk_idx: expected dtype")
    assert refused.block.announce == 1
    with pytest.raises(ValueError, match="x"):
        buffer.combine(torch.zeros(4, HIDDEN, dtype=torch.bfloat16), handle)
    assert gpu.launches[-1].name == "combine"
    assert gpu.launches[-1].announcement.status == constants["STATUS_REFUSED"]
    # The next call's announcement is not refused.
    buffer.dispatch(inputs(), handle=handle)
    assert gpu.launches[-1].announcement.status == constants["STATUS_OK"]


def test_a_dispatch_refused_by_the_kernels_is_raised(buffer, gpu):
    buffer.dispatch(inputs(), choices())
    gpu.verdicts = ["FIXED_ROWS"]
    with pytest.raises(ValueError, match="fixed_rows: None is too few"):
        buffer.dispatch(inputs(), choices())
    buffer.dispatch(inputs(), choices())  # acknowledged


def test_a_refusal_nobody_waited_for_is_raised_once_by_a_later_call(buffer, gpu):
    buffer.dispatch(inputs(), choices(), fixed_rows=9)
    report = buffer._backend._engine.report
    report.refused_verdict, report.refused_choice = abi.constants["FIXED_ROWS"], -1
    gpu.verdicts = ["FIXED_ROWS"]
    with pytest.raises(ValueError, match="fixed_rows: too few in an earlier dispatch"):
        buffer.dispatch(inputs(), choices(), fixed_rows=9)
    buffer.dispatch(inputs(), choices(), fixed_rows=9)
    buffer.check()


def test_a_closed_or_broken_buffer_refuses_calls(buffer, gpu):
    buffer._backend._engine.report.failed = 1
    with pytest.raises(epcomm.BufferClosedError, match="an earlier call failed"):
        buffer.dispatch(inputs(), choices())
    assert not gpu.launches


def test_a_buffer_that_cannot_be_made_gives_its_sms_back(monkeypatch, gpu):
    def refuse(num_bytes):
        raise MemoryError(f"no memory for {num_bytes} bytes")

    monkeypatch.setattr(gpu, "allocate", refuse)
    with pytest.raises(MemoryError) as caught:
        make_buffer(monkeypatch, gpu)
    # Whoever keeps the exception keeps what was being made.
    assert caught.value.__traceback__ is not None
    assert gpu.held_sms == {"a GPU": 0}
