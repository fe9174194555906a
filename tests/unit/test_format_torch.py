import numpy as np
import pytest
import torch

from epcomm import formats
from epcomm.formats import WireFormat, reference

HIDDENS = [16, 48, 136, 200, 512, 520]
DTYPES = [torch.bfloat16, torch.float32]


def sample(hidden, dtype, rows=5):
    x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(hidden)) * 3
    return x.to(dtype)


def as_bf16(x):
    return torch.from_numpy(reference.f32_to_bf16(x).view(np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDENS)
def test_fp8_matches_the_reference(hidden, dtype, scale_format):
    x = sample(hidden, dtype)
    q, scales = formats.quantize_fp8(x, scale_format)
    codes, expected = reference.fp8_encode(x.float().numpy(), scale_format)
    assert q.dtype == torch.float8_e4m3fn
    assert np.array_equal(q.view(torch.uint8).numpy(), codes)
    assert np.array_equal(scales.numpy(), expected)
    decoded = reference.fp8_decode(codes, expected, scale_format)
    assert np.array_equal(formats.dequantize_fp8(q, scales, torch.float32).numpy(), decoded)
    assert torch.equal(formats.dequantize_fp8(q, scales), as_bf16(decoded))


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDENS)
def test_logfmt_matches_the_reference(hidden, dtype, bits):
    x = sample(hidden, dtype)
    data = formats.logfmt_encode(x, bits)
    expected = reference.logfmt_encode(x.float().numpy(), bits)
    assert data.dtype == torch.uint8
    assert np.array_equal(data.numpy(), expected)
    decoded = reference.logfmt_decode(expected, hidden, bits)
    out = formats.logfmt_decode(data, hidden, bits, torch.float32)
    assert np.array_equal(out.numpy(), decoded)
    assert torch.equal(formats.logfmt_decode(data, hidden, bits), as_bf16(decoded))


def test_no_rows():
    x = torch.empty(0, 256)
    q, scales = formats.quantize_fp8(x)
    assert (q.shape, scales.shape) == ((0, 256), (0, 2))
    assert formats.dequantize_fp8(q, scales).shape == (0, 256)
    q, scales = formats.quantize_fp8(x, "ue8m0")
    assert scales.shape == (0, 1)
    assert formats.dequantize_fp8(q, scales).shape == (0, 256)
    data = formats.logfmt_encode(x, 10)
    assert formats.logfmt_decode(data, 256, 10).shape == (0, 256)


def test_a_tensor_that_requires_grad_is_accepted():
    x = torch.ones(2, 128, requires_grad=True)
    q, scales = formats.quantize_fp8(x)
    assert torch.equal(formats.dequantize_fp8(q, scales, torch.float32), torch.ones(2, 128))


@pytest.mark.parametrize(
    ("wire", "payload", "scales"),
    [
        (WireFormat.F32, 800, 0),
        (WireFormat.BF16, 400, 0),
        (WireFormat.FP8, 200, 8),
        (WireFormat.FP8_UE8M0, 200, 4),
        (WireFormat.LOGFMT8, 200, 8),
        (WireFormat.LOGFMT10, 250, 8),
    ],
)
def test_bytes_of_a_row_of_200(wire, payload, scales):
    assert wire.payload_bytes(200) == payload
    assert wire.scale_bytes(200) == scales


@pytest.mark.parametrize("hidden", [*HIDDENS, 1, 127, 129, 7168])
def test_bytes_agree_with_the_codecs(hidden):
    x = torch.ones(1, hidden)
    for wire, scale_format in ((WireFormat.FP8, "f32"), (WireFormat.FP8_UE8M0, "ue8m0")):
        q, scales = formats.quantize_fp8(x, scale_format)
        assert q.nbytes == wire.payload_bytes(hidden)
        assert scales.nbytes == wire.scale_bytes(hidden)
    for wire in (WireFormat.LOGFMT8, WireFormat.LOGFMT10):
        row = reference.logfmt_row_bytes(hidden, wire.logfmt_bits)
        assert wire.payload_bytes(hidden) + wire.scale_bytes(hidden) == row
        assert formats.logfmt_row_bytes(hidden, wire.logfmt_bits) == row


def test_the_numbers_of_the_formats():
    assert [(w.name, w.value) for w in WireFormat] == [
        ("F32", 0),
        ("BF16", 1),
        ("FP8", 2),
        ("FP8_UE8M0", 3),
        ("LOGFMT8", 4),
        ("LOGFMT10", 5),
    ]


X = torch.ones(2, 200)
Q, SCALES = formats.quantize_fp8(X)
DATA = formats.logfmt_encode(X, 10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: formats.quantize_fp8(X.numpy()), TypeError, "x must be a torch.Tensor"),
        (lambda: formats.quantize_fp8(X.half()), TypeError, "x must be .*got torch.float16"),
        (lambda: formats.quantize_fp8(X[0]), ValueError, r"two dimensions, got shape \(200,\)"),
        (lambda: formats.quantize_fp8(X.T), ValueError, "x must be contiguous"),
        (lambda: formats.quantize_fp8(X[:, :0]), ValueError, "at least one column"),
        (lambda: formats.quantize_fp8(X.to("meta")), ValueError, "on the CPU, got meta"),
        (lambda: formats.quantize_fp8(X, "e8m0"), ValueError, "scale_format .* got 'e8m0'"),
        (lambda: formats.dequantize_fp8(X, SCALES), TypeError, "q must be torch.float8_e4m3fn"),
        (lambda: formats.dequantize_fp8(Q, SCALES.half()), TypeError, "scales must be"),
        (lambda: formats.dequantize_fp8(Q, SCALES[:1]), ValueError, r"shape \(2, 2\), got \(1"),
        (lambda: formats.dequantize_fp8(Q, SCALES.int()), ValueError, r"shape \(2, 1\)"),
        (lambda: formats.dequantize_fp8(Q, SCALES, torch.half), TypeError, "dtype must be"),
        (lambda: formats.logfmt_encode(X, 9), ValueError, "bits must be 8 or 10, got 9"),
        (lambda: formats.logfmt_encode(X.double(), 8), TypeError, "x must be"),
        (lambda: formats.logfmt_decode(DATA, 200, 8), ValueError, r"shape \(2, 208\)"),
        (lambda: formats.logfmt_decode(DATA, 200, 16), ValueError, "bits"),
        (lambda: formats.logfmt_decode(DATA.int(), 200, 10), TypeError, "data must be torch.uint8"),
        (lambda: formats.logfmt_decode(DATA, 200, 10, torch.half), TypeError, "dtype"),
        (lambda: formats.logfmt_row_bytes(0, 8), ValueError, "hidden must be at least 1, got 0"),
        (lambda: WireFormat.F32.payload_bytes(-1), ValueError, "hidden"),
        (lambda: WireFormat.F32.scale_bytes(0), ValueError, "hidden"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
