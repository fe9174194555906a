"""The CUDA packing to FP8, run on the host, equals the reference byte for byte."""

import ctypes

import numpy as np
import pytest

from epcomm.formats import reference

pytestmark = pytest.mark.timeout(120)


class _Packing(ctypes.Structure):
    """``emulated_packing``."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("f32", "power_of_two", "tokens", "hidden")),
        ("scale_bytes", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scales")),
    ]


def check_packing(one_node, x, *, f32, scale_format):
    """Pack rows of float32 numbers (rounded to BF16 first if not ``f32``); compare all bytes."""
    tokens, hidden = x.shape
    given = x if f32 else reference.f32_to_bf16(x)
    x = x if f32 else reference.bf16_to_f32(given)
    want, want_scales = reference.fp8_encode(x, scale_format)
    ue8m0 = scale_format == "ue8m0"
    scale_bytes = -(-hidden // 128) * (1 if ue8m0 else 4)
    codes = np.full((tokens, hidden), 0xEE, np.uint8)
    stride = -(-scale_bytes // 4) * 4
    scales = np.full((tokens, stride), 0xEE, np.uint8)
    given = np.ascontiguousarray(given)
    raw = np.zeros(given.nbytes + 16, np.uint8)
    aligned = raw[-raw.ctypes.data % 16 :][: given.nbytes]
    aligned[:] = given.view(np.uint8).reshape(-1)
    call = _Packing(
        *(f32, ue8m0, tokens, hidden, stride),
        *(aligned.ctypes.data, codes.ctypes.data, scales.ctypes.data),
    )
    one_node.emulate_packing(ctypes.byref(call))
    np.testing.assert_array_equal(codes, want)
    got = scales[:, :scale_bytes]
    np.testing.assert_array_equal(
        got, np.ascontiguousarray(want_scales).view(np.uint8)[:, :scale_bytes]
    )
    assert (scales[:, scale_bytes:] == 0xEE).all()


def draw(rng, shape, low, high):
    """Random signs, magnitudes 2^low to 2^high, those of a tile near each other."""
    tokens, hidden = shape
    exponents = np.repeat(rng.uniform(low, high, (tokens, -(-hidden // 128))), 128, axis=1)
    exponents = exponents[:, :hidden] - rng.uniform(0, 9, shape)
    signs = rng.choice([-1.0, 1.0], shape)
    return (signs * np.exp2(exponents)).astype(np.float32)


def test_quotients_are_rounded_right(one_node):
    assert one_node.wrong_quotients() == 0


@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
@pytest.mark.parametrize("f32", [False, True])
@pytest.mark.parametrize("hidden", [16, 128, 144, 512, 528, 1024, 1040, 1536, 1680])
def test_any_length(one_node, hidden, f32, scale_format):
    rng = np.random.default_rng(hidden)
    x = draw(rng, (5, hidden), -20, 20)
    x[3] = 0
    check_packing(one_node, x, f32=f32, scale_format=scale_format)


@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
@pytest.mark.parametrize("f32", [False, True])
@pytest.mark.parametrize(("low", "high"), [(95, 127.9), (-127, -90), (-15, -12)])
def test_either_end(one_node, low, high, f32, scale_format):
    """Scales that ordinary division steps would get wrong, and the least amax that is kept."""
    x = draw(np.random.default_rng(1), (6, 1168), low, high)
    check_packing(one_node, x, f32=f32, scale_format=scale_format)


@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
@pytest.mark.parametrize("f32", [False, True])
def test_infinities_and_nans_spoil_no_neighbour(one_node, f32, scale_format):
    rng = np.random.default_rng(2)
    x = draw(rng, (8, 1168), -3, 3)
    for row in x[1:]:
        at = rng.choice(len(row), 3, replace=False)
        row[at] = [np.inf, -np.inf, np.nan]
    x[7] = np.inf
    check_packing(one_node, x, f32=f32, scale_format=scale_format)
