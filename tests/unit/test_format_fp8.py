import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epcomm.formats import kernels, reference
from epcomm.formats.constants import TILE, tiles_of

HIDDENS = [16, 48, 128, 136, 200, 512, 520]
FORMATS = ["f32", "ue8m0"]


def scale_bytes(scales):
    return scales.astype("<i4").view(np.uint8) if scales.dtype == np.int32 else scales


def pack_rows(x, scale_format, width="f32"):
    """Run the kernels row by row, every output byte poisoned beforehand."""
    T, H = x.shape
    q = np.full((T, H), 0xEE, np.uint8)
    suffix = "_ue8m0" if scale_format == "ue8m0" else ""
    pack = getattr(kernels, f"fp8_pack_row_{width}{suffix}")
    if scale_format == "f32":
        s = np.full((T, tiles_of(H)), -1, np.float32)
    else:
        s = np.full((T, 4 * -(-tiles_of(H) // 4)), 0xEE, np.uint8)
    for t in range(T):
        pack(x[t], q[t], s[t])
    return q, s


def unpack_rows(q, s):
    out = np.full(q.shape, 7, np.float32)
    unpack = kernels.fp8_unpack_row if s.dtype == np.float32 else kernels.fp8_unpack_row_ue8m0
    for t in range(len(q)):
        unpack(q[t], s[t], out[t])
    return out


def assert_kernels_match(x, scale_format, bf16):
    codes, scales = reference.fp8_encode(x, scale_format)
    q, s = pack_rows(x, scale_format)
    assert np.array_equal(q, codes)
    assert np.array_equal(s, scale_bytes(scales))
    if bf16:
        q, s = pack_rows(reference.f32_to_bf16(x), scale_format, "bf16")
        assert np.array_equal(q, codes)
        assert np.array_equal(s, scale_bytes(scales))
    decoded = reference.fp8_decode(codes, scales, scale_format)
    assert np.array_equal(unpack_rows(q, s).view(np.uint32), decoded.view(np.uint32))


@pytest.mark.parametrize("scale_format", FORMATS)
def test_every_bf16_pattern(scale_format):
    shuffled = np.random.default_rng(0).permutation(65536).astype(np.uint16)
    assert_kernels_match(reference.bf16_to_f32(shuffled).reshape(32, 2048), scale_format, bf16=True)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_every_bf16_pattern_under_an_ordinary_scale(scale_format):
    """Tiles of neighbouring patterns: amax is near every element, all codes are exercised."""
    x = reference.bf16_to_f32(np.arange(65536, dtype=np.uint32).astype(np.uint16))
    assert_kernels_match(x.reshape(32, 2048), scale_format, bf16=True)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    hidden=st.sampled_from(HIDDENS),
    scale_format=st.sampled_from(FORMATS),
    spread=st.sampled_from([0.0, 1.0, 6.0, 40.0]),
    nonfinite=st.booleans(),
)
def test_random_rows(seed, hidden, scale_format, spread, nonfinite):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, hidden)) * 2.0 ** (rng.standard_normal((2, hidden)) * spread)
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    if nonfinite:
        x[rng.random(x.shape) < 0.05] = rng.choice([np.nan, -np.nan, np.inf, -np.inf])
    assert_kernels_match(x, scale_format, bf16=False)
    assert_kernels_match(reference.bf16_to_f32(reference.f32_to_bf16(x)), scale_format, bf16=True)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale_format=st.sampled_from(FORMATS))
def test_random_float32_bits(seed, scale_format):
    bits = np.random.default_rng(seed).integers(0, 2**32, (2, 200), np.uint32)
    assert_kernels_match(bits.view(np.float32), scale_format, bf16=False)


@pytest.mark.parametrize("hidden", HIDDENS)
def test_codes_equal_torchs_cast(hidden):
    x = torch.randn(8, hidden, generator=torch.Generator().manual_seed(3)) * 5
    padded = torch.nn.functional.pad(x, (0, tiles_of(hidden) * TILE - hidden))
    tiles = padded.view(8, -1, TILE)
    amax = tiles.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    expected = (
        (tiles * (torch.full_like(amax, 448.0) / amax))
        .to(torch.float8_e4m3fn)
        .view(8, -1)[:, :hidden]
    )
    codes, scales = reference.fp8_encode(x.numpy(), "f32")
    assert np.array_equal(codes, expected.view(torch.uint8).numpy())
    assert np.array_equal(scales, (amax / 448.0).squeeze(-1).numpy())


def test_values_equal_torchs():
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(reference.e4m3_values(), values)


def test_rounding_to_e4m3_equals_torchs_on_every_tie_and_its_neighbours():
    values = reference.e4m3_values()[:127]
    ties = (values[1:] + values[:-1]) / 2
    y = np.concatenate([values, ties, np.nextafter(ties, 0), np.nextafter(ties, 999)])
    y = np.concatenate([y, -y]).astype(np.float32)
    expected = torch.from_numpy(y).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(reference.f32_to_e4m3(y), expected)
    assert list(reference.f32_to_e4m3(np.float32([449, 1e30, -1e30]))) == [0x7E, 0x7E, 0xFE]


@pytest.mark.parametrize("scale_format", FORMATS)
def test_a_nonfinite_value_stays_alone(scale_format):
    x = np.linspace(-3, 3, 256, dtype=np.float32)[None].copy()
    clean, clean_scales = reference.fp8_encode(x, scale_format)
    x[0, [5, 6, 7, 9]] = [np.nan, np.inf, -np.inf, -np.nan]
    codes, scales = reference.fp8_encode(x, scale_format)
    assert list(codes[0, [5, 6, 7, 9]]) == [0x7F, 0x7F, 0xFF, 0xFF]
    others = np.delete(np.arange(256), [5, 6, 7, 9])
    assert np.array_equal(codes[0, others], clean[0, others])
    assert np.array_equal(scales, clean_scales)
    decoded = reference.fp8_decode(codes, scales, scale_format)[0]
    assert np.isnan(decoded[[5, 6, 7, 9]]).all()
    assert np.isfinite(decoded[others]).all()
    assert_kernels_match(x, scale_format, bf16=False)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_zeros_subnormals_and_a_tile_without_finite_values(scale_format):
    x = np.zeros((1, 512), np.float32)
    x[0, :128:2] = -0.0
    x[0, 128:256] = np.float32(1e-40)
    x[0, 256:384] = np.nan
    x[0, 384:] = -np.float32(1e-45)
    codes, scales = reference.fp8_encode(x, scale_format)
    assert list(codes[0, [0, 1, 128, 384]]) == [0x80, 0, 0, 0x80]
    assert (codes[0, 256:384] == 0x7F).all()
    if scale_format == "f32":
        assert (scales == np.float32(1e-4) / np.float32(448)).all()
    assert_kernels_match(x, scale_format, bf16=False)


def test_power_of_two_scales_by_hand():
    x = np.zeros((1, 5 * 128), np.float32)
    x[0, 0::128] = [448, 449, 1, 7, 896]
    _, scales = reference.fp8_encode(x, "ue8m0")
    # 448/448 = 2^0; just above needs 2^1; 1/448 -> 2^-8; 7/448 = 2^-6; 896/448 = 2^1.
    assert list(scales[0].astype("<i4").view(np.uint8)) == [127, 128, 119, 121, 128, 0, 0, 0]
    assert scales[0, 0] == 127 | 128 << 8 | 119 << 16 | 121 << 24


@pytest.mark.parametrize("scale_format", FORMATS)
def test_every_code_decodes_under_unusual_scales(scale_format):
    codes = np.tile(np.arange(256, dtype=np.uint8), (1, 5))
    if scale_format == "f32":
        scales = np.float32([[1, 1e-38, 1e-45, 3e38, np.inf, np.nan, 0, 1e-4, 1 / 3, 7]])
        s = scales
    else:
        s = np.uint8([[0, 1, 127, 128, 254, 255, 10, 100, 200, 119, 0, 0]])
        scales = s.view("<i4").astype(np.int32)
    decoded = reference.fp8_decode(codes, scales, scale_format)
    assert np.array_equal(unpack_rows(codes, s).view(np.uint32), decoded.view(np.uint32))
    nan = decoded.view(np.uint32)[np.isnan(decoded)]
    assert set(nan) <= {0x7FC00000, 0xFFC00000}


@pytest.mark.parametrize("scale_format", FORMATS)
def test_error_bound_and_order(scale_format):
    x = np.sort(np.random.default_rng(5).standard_normal(128).astype(np.float32))[None]
    codes, scales = reference.fp8_encode(x, scale_format)
    decoded = reference.fp8_decode(codes, scales, scale_format)
    assert (np.diff(decoded[0]) >= 0).all()
    step = np.abs(x).max() / 448 * (1 if scale_format == "f32" else 2)
    assert (np.abs(decoded - x) <= np.maximum(np.abs(x) / 16, step * 2.0**-10) * 1.0001).all()
