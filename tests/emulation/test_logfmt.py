"""The CUDA codec of LogFMT, run on the host, equals the reference byte for byte.

Rows of float32 sums, held by lanes as a combine holds those of BF16 and of float32 rows.
"""

import ctypes

import numpy as np
import pytest

from epcomm.formats import reference
from epcomm.formats.wire import WireFormat
from epcomm.native import combine_record

#: Elements of a row, multiples of 8.
HIDDENS = [8, 16, 120, 128, 136, 200, 256, 264, 384, 512, 520, 776, 1160]
rows_of = pytest.mark.parametrize(
    ("f32", "hidden"), [(f, h) for f in (False, True) for h in HIDDENS]
)
wires = pytest.mark.parametrize("wire", [WireFormat.LOGFMT8, WireFormat.LOGFMT10])
pytestmark = pytest.mark.timeout(120)


class _Codec(ctypes.Structure):
    """``emulated_codec``."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("f32_rows", "wire", "tokens", "hidden")),
        *((name, ctypes.c_int32) for name in ("scales", "record_bytes")),
        *((name, ctypes.c_void_p) for name in ("x", "records", "decoded")),
    ]


def check_codec(library, x, wire, *, f32):
    """Encode and decode; compare the bytes, those behind the row included, and the numbers."""
    tokens, hidden = x.shape
    x = np.ascontiguousarray(x, np.float32)
    record = combine_record(wire, hidden, 3, True)
    raw = np.full(tokens * record.bytes + 16, 0xEE, np.uint8)
    start = -raw.ctypes.data % 16
    records = raw[start:][: tokens * record.bytes].reshape(tokens, record.bytes)
    decoded = np.full((tokens, hidden), 7, np.float32)
    call = _Codec(
        *(f32, wire, tokens, hidden, record.scales, record.bytes),
        *(x.ctypes.data, records.ctypes.data, decoded.ctypes.data),
    )
    library.emulate_codec(ctypes.byref(call))
    bits = wire.logfmt_bits
    want = reference.logfmt_encode(x, bits)
    used = record.payload_bytes + record.scale_bytes
    np.testing.assert_array_equal(records[:, :used], want)
    assert (records[:, used:] == 0xEE).all()
    numbers = reference.logfmt_decode(want, hidden, bits)
    np.testing.assert_array_equal(np.isnan(decoded), np.isnan(numbers))
    finite = ~np.isnan(numbers)
    np.testing.assert_array_equal(decoded.view(np.uint32)[finite], numbers.view(np.uint32)[finite])


def draw(rng, shape, centre, spread):
    """Random signs, magnitudes around 2^centre."""
    exponent = centre + rng.standard_normal(shape) * spread
    with np.errstate(over="ignore"):
        x = (rng.standard_normal(shape) * 2.0**exponent).astype(np.float32)
    return np.clip(x, -np.finfo(np.float32).max, np.finfo(np.float32).max)


@wires
@rows_of
def test_rows_of_every_length_and_magnitude(emulated, f32, hidden, wire):
    rng = np.random.default_rng(hidden)
    centres = (-148, -135, -126, -100, -64, -30, 0, 60, 125)
    rows = [
        draw(rng, hidden, centre, spread) for centre in centres for spread in (0.0, 2.0, 12.0, 40.0)
    ]
    check_codec(emulated, np.array(rows), wire, f32=f32)


@wires
@pytest.mark.parametrize("f32", [False, True])
def test_every_bf16_value(emulated, f32, wire):
    patterns = np.arange(65536).astype(np.uint16)
    # Neighbours in a tile; then any 128 finite ones together.
    check_codec(emulated, reference.bf16_to_f32(patterns).reshape(32, 2048), wire, f32=f32)
    finite = patterns[(patterns & 0x7F80) != 0x7F80]
    shuffled = np.random.default_rng(0).permutation(finite)
    check_codec(emulated, reference.bf16_to_f32(shuffled).reshape(30, 2176), wire, f32=f32)


@wires
@pytest.mark.parametrize("f32", [False, True])
def test_random_bits(emulated, f32, wire):
    raw = np.random.default_rng(1).integers(0, 2**32, (40, 520), np.uint32)
    raw[(raw & 0x7F800000) == 0x7F800000] &= np.uint32(0xBFFFFFFF)
    check_codec(emulated, raw.view(np.float32), wire, f32=f32)


@wires
@rows_of
def test_tiles_do_not_touch_each_other(emulated, f32, hidden, wire):
    # A tile of zeros of both signs, of one value, of subnormals, with a NaN, with an infinity, and
    # an ordinary one, in every order.
    rng = np.random.default_rng(hidden)
    tiles = -(-hidden // 128)
    kinds = rng.integers(0, 7, (60, tiles))
    x = np.empty((60, tiles, 128), np.float32)
    for t, tile in np.ndindex(kinds.shape):
        kind = kinds[t, tile]
        signs = rng.choice(np.float32([-1, 1]), 128)
        some = {0: 0.0, 1: 3.0, 2: 1e-45, 3: 5e-40, 4: np.finfo(np.float32).max}.get(kind)
        values = draw(rng, 128, 0, 3.0) if some is None else np.float32(some) * signs
        if kind in (3, 6):
            values[rng.random(128) < 0.5] = -0.0
        if kind == 5:
            # Where a short row has it too.
            values[rng.integers(0, min(128, hidden - 128 * tile))] = rng.choice(
                np.float32([np.nan, -np.nan, np.inf, -np.inf])
            )
        x[t, tile] = values
    check_codec(emulated, x.reshape(60, -1)[:, :hidden], wire, f32=f32)


@wires
@pytest.mark.parametrize("f32", [False, True])
def test_spreads_that_are_hard_to_divide(emulated, f32, wire):
    # The narrowest tiles that are not of one value, and those at the limit of the range.
    rng = np.random.default_rng(2)
    near_one = np.float32(1) + rng.integers(-40, 40, (30, 256)).astype(np.float32) * 2.0**-24
    wide = 2.0 ** rng.uniform(-33.5, 0.5, (30, 256))
    one_step = np.where(rng.random((30, 256)) < 0.5, 1.0, rng.choice([1.004, 1.0 + 2.0**-23]))
    for x in (near_one, wide, one_step):
        check_codec(emulated, x.astype(np.float32), wire, f32=f32)
