"""Argument checks that need no peers; the messages for a whole call are in tests/mpi."""

import math
from dataclasses import replace

import pytest
import torch

from epcomm.backend import Config
from epcomm.check import (
    check_combine,
    check_config,
    check_dispatch,
    check_handle,
    check_rows,
    check_tensor,
    row_format,
)
from epcomm.formats.wire import WireFormat
from epcomm.results import Handle

CONFIG = Config(hidden=256, num_experts=16, num_topk=2, max_tokens=4)
OWNER = object()
DEFAULTS = {
    "quantize": None, "layout": "rank", "alignment": 1, "fixed_rows": None, "handle": None
}  # fmt: skip


#: Tensors without memory stand for those of a GPU: they have a device and addresses.
ON_DEVICE = replace(CONFIG, device="meta")


def shifted(*shape, dtype=torch.bfloat16):
    """A contiguous tensor that starts one element after a multiple of 16 bytes."""
    flat = torch.empty(math.prod(shape) + 1, dtype=dtype, device="meta")
    return flat[1:].view(shape)


def dispatch(x, topk_idx=None, topk_weights=None, **change):
    return check_dispatch(CONFIG, OWNER, x, topk_idx, topk_weights, **{**DEFAULTS, **change})


@pytest.mark.parametrize("num_ranks", [1, 2, 16])
def test_good_config(num_ranks):
    check_config(CONFIG, num_ranks)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"hidden": 12}, ValueError, "hidden: 12 .* 16-byte units; expected a multiple of 8"),
        ({"hidden": 2**21}, ValueError, f"hidden: {2**21} is not in 1..{2**20}"),
        ({"num_experts": 15}, ValueError, "num_experts: 15 .* 2 ranks"),
        ({"num_experts": 2**17}, ValueError, "num_experts: .* 1..65536"),
        ({"num_topk": 0}, ValueError, "num_topk: 0 is not in 1..256"),
        ({"num_topk": 18}, ValueError, "num_topk: 18 exceeds num_experts=16"),
        ({"num_topk": True}, TypeError, "num_topk: expected an int, got bool"),
        ({"max_tokens": None}, TypeError, "max_tokens: expected an int, got NoneType"),
    ],
)
def test_bad_config(change, kind, words):
    with pytest.raises(kind, match=words):
        check_config(Config(**{**vars(CONFIG), **change}), 2)


def test_row_numbers_fit_32_bits():
    check_config(Config(8, 4096, 1, 2**19 - 1), 4096)
    with pytest.raises(ValueError, match=r"max_tokens: 4096 ranks .* 32 bits"):
        check_config(Config(8, 4096, 1, 2**19), 4096)


def test_check_tensor_accepts_and_detaches():
    x = torch.zeros(2, 3, requires_grad=True)
    for shape in ((2, 3), (None, 3), (None, None)):
        got = check_tensor("x", x, [torch.float32], shape)
        assert got.data_ptr() == x.data_ptr()
        assert not got.requires_grad


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ((), (None,)),
        ((2,), (3,)),
        ((2, 3), (2,)),
        ((2, 3), (3, None)),
        ((2, 3), (None, 2)),
        ((2, 3), (2, 3, 1)),
        ((2, 3, 4), (2, None, 5)),
    ],
)
def test_other_shapes_are_refused(shape, want):
    with pytest.raises(ValueError, match="x: expected shape"):
        check_tensor("x", torch.zeros(shape), [torch.float32], want)


class Foreign:
    """Stands for an array of another library in GPU memory."""

    __cuda_array_interface__ = None

    def __init__(self, tensor):
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.__dlpack__, self.__dlpack_device__ = tensor.__dlpack__, tensor.__dlpack_device__


@pytest.mark.parametrize(
    ("dtype", "words", "fmt"),
    [(torch.float32, 2, WireFormat.FP8), (torch.int32, 1, WireFormat.FP8_UE8M0)],
)
def test_scales_of_another_library_are_adopted(dtype, words, fmt):
    scales = torch.zeros(3, words, dtype=dtype)
    call = dispatch((torch.zeros(3, 256, dtype=torch.float8_e4m3fn), Foreign(scales)),
                    torch.zeros(3, 2, dtype=torch.int64))  # fmt: skip
    assert call.format == fmt
    assert call.scales.data_ptr() == scales.data_ptr()


def test_shapes_of_any_rank_are_accepted():
    for shape, want in [((), ()), ((2,), (None,)), ((2, 3, 4), (2, None, 4)), ((0, 3), (None, 3))]:
        assert check_tensor("x", torch.zeros(shape), [torch.float32], want).shape == shape


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ([1.0], TypeError, "y: expected a torch.Tensor, got list"),
        (torch.zeros(2, 3), TypeError, "y: expected dtype int32 or int64, got float32"),
        (
            torch.zeros(3, 3, dtype=torch.int32),
            ValueError,
            r"expected shape \[2, \*\], got \[3, 3\]",
        ),
        (torch.zeros(2, dtype=torch.int32), ValueError, r"expected shape \[2, \*\], got \[2\]"),
        (
            torch.zeros(2, 3, dtype=torch.int32, device="meta"),
            ValueError,
            "on cpu, got one on meta",
        ),
        (torch.zeros(3, 2, dtype=torch.int32).T, ValueError, r"contiguous .* strides \[1, 2\]"),
    ],
)
def test_check_tensor_refuses(value, kind, words):
    with pytest.raises(kind, match=words):
        check_tensor("y", value, [torch.int32, torch.int64], (2, None))


def test_a_gpus_number_counts():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="x: expected a tensor on cuda:1, got one on cpu"):
        check_tensor("x", x, [torch.float32], (2, 3), device="cuda:1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_rows_between_units_are_refused_on_a_gpu(dtype):
    aligned = torch.empty(3, 256, dtype=dtype, device="meta")
    assert check_rows("x", aligned, [dtype], (None, 256), ON_DEVICE).shape == (3, 256)
    words = rf"x: .* multiple of 16 bytes, got one {dtype.itemsize} bytes after .* x.clone\(\)"
    with pytest.raises(ValueError, match=words):
        check_rows("x", shifted(3, 256, dtype=dtype), [dtype], (None, 256), ON_DEVICE)
    on_cpu = torch.empty(3 * 256 + 1, dtype=dtype)[1:].view(3, 256)
    check_rows("x", on_cpu, [dtype], (None, 256), CONFIG)


def test_every_tensor_of_rows_must_be_aligned():
    ids = torch.empty(3, 2, dtype=torch.int64, device="meta")
    rows = torch.empty(3, 256, dtype=torch.bfloat16, device="meta")
    scales = torch.empty(3, 2, device="meta")
    for x in (shifted(3, 256), (shifted(3, 256, dtype=torch.float8_e4m3fn), scales)):
        with pytest.raises(ValueError, match="multiple of 16 bytes"):
            check_dispatch(ON_DEVICE, OWNER, x, ids, None, **DEFAULTS)
    handle = Handle(OWNER, object(), 3, 3, "rank")
    good = {"weights": None, "topk_weights": None, "bias": None, "wire": None, "out": None}
    check_combine(ON_DEVICE, OWNER, rows, handle, **good)
    for name in ("x", "bias", "out"):
        x = shifted(3, 256) if name == "x" else rows
        given = good if name == "x" else {**good, name: shifted(3, 256)}
        with pytest.raises(ValueError, match=f"{name}: .* multiple of 16 bytes"):
            check_combine(ON_DEVICE, OWNER, x, handle, **given)


@pytest.mark.parametrize(
    ("x", "want"),
    [
        (torch.zeros(3, 256), WireFormat.F32),
        (torch.zeros(3, 256, dtype=torch.bfloat16), WireFormat.BF16),
        ((torch.zeros(3, 256).to(torch.float8_e4m3fn), torch.zeros(3, 2)), WireFormat.FP8),
        (
            (torch.zeros(3, 256).to(torch.float8_e4m3fn), torch.zeros(3, 1, dtype=torch.int32)),
            WireFormat.FP8_UE8M0,
        ),
    ],
)
def test_formats_of_rows(x, want):
    call = dispatch(x, torch.zeros(3, 2, dtype=torch.int64))
    assert call.format is want
    assert (call.scales is None) == (not isinstance(x, tuple))


def test_row_format():
    assert row_format(torch.float32, "fp8") is WireFormat.FP8
    assert row_format(torch.bfloat16, "fp8_ue8m0") is WireFormat.FP8_UE8M0
    for bad in ("FP8", 8, ["fp8"]):
        with pytest.raises(ValueError, match="quantize: expected None or one of"):
            row_format(torch.bfloat16, bad)


def test_a_handle_brings_its_own_layout():
    class Routes:
        alignment, fixed_rows = 8, 64

    handle = Handle(OWNER, Routes(), 3, 64, "expert")
    call = dispatch(torch.zeros(3, 256), handle=handle)
    assert (call.layout, call.alignment, call.fixed_rows) == ("expert", 8, 64)
    assert call.topk_idx is None


def test_handles():
    handle = Handle(OWNER, object(), 1, 1, "rank")
    assert check_handle(handle, OWNER) is handle
    with pytest.raises(ValueError, match="another buffer"):
        check_handle(handle, object())
    handle.release()
    with pytest.raises(ValueError, match="released"):
        check_handle(handle, OWNER)
    with pytest.raises(TypeError, match="epcomm Handle, got int"):
        check_handle(3, OWNER)


def test_combine_defaults_follow_the_rows():
    handle = Handle(OWNER, object(), 3, 5, "expert")
    given = {"weights": None, "topk_weights": torch.zeros(5), "wire": None, "out": None}
    for dtype, wire in ((torch.bfloat16, WireFormat.BF16), (torch.float32, WireFormat.F32)):
        bias = torch.zeros(3, 256, dtype=dtype)
        for biases, count in ((None, 0), (bias, 1), ([bias, bias], 2), ((), 0)):
            y = torch.zeros(5, 256, dtype=dtype)
            call = check_combine(CONFIG, OWNER, y, handle, bias=biases, **given)
            assert call.wire is wire
            assert len(call.bias) == count
