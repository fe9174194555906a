import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epcomm.formats import kernels, reference

EVERY_BF16 = np.arange(65536, dtype=np.uint32).astype(np.uint16)


def test_widening_every_pattern_is_a_shift():
    out = np.empty(65536, np.float32)
    kernels.bf16_to_f32_row(EVERY_BF16, out)
    expected = np.arange(65536, dtype=np.uint32) << 16
    assert np.array_equal(out.view(np.uint32), expected)
    assert np.array_equal(reference.bf16_to_f32(EVERY_BF16).view(np.uint32), expected)


def test_every_pattern_survives_the_round_trip_except_nan_payloads():
    x = reference.bf16_to_f32(EVERY_BF16)
    expected = np.where(np.isnan(x), 0x7FC0 | (EVERY_BF16 & 0x8000), EVERY_BF16)
    out = np.empty(65536, np.uint16)
    kernels.f32_to_bf16_row(x, out)
    assert np.array_equal(out, expected)
    assert np.array_equal(reference.f32_to_bf16(x), expected)


def test_rounds_to_nearest_even():
    x = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x00008001], np.uint32)
    expected = np.array([0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x0001], np.uint16)
    out = np.empty(5, np.uint16)
    kernels.f32_to_bf16_row(x.view(np.float32), out)
    assert np.array_equal(out, expected)
    assert np.array_equal(reference.f32_to_bf16(x.view(np.float32)), expected)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 300))
def test_rounding_random_bits_matches_the_reference_and_torch(seed, n):
    x = np.random.default_rng(seed).integers(0, 2**32, n, np.uint32).view(np.float32)
    out = np.empty(n, np.uint16)
    kernels.f32_to_bf16_row(x, out)
    assert np.array_equal(out, reference.f32_to_bf16(x))
    finite = np.isfinite(x)
    torch_bits = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(out[finite], torch_bits[finite])


def test_adding_a_row_is_one_float32_addition():
    rng = np.random.default_rng(1)
    row = reference.f32_to_bf16(rng.standard_normal(777, np.float32))
    acc = rng.standard_normal(777, np.float32)
    expected = acc + reference.bf16_to_f32(row)
    kernels.add_bf16_row(row, acc)
    assert np.array_equal(acc, expected)
