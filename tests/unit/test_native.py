"""The C header's records and structures, against offsets computed by hand."""

import ctypes
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from epcomm import native
from epcomm.fabric import abi as fabric_abi
from epcomm.formats import logfmt_row_bytes, reference
from epcomm.formats.constants import TILE, logfmt_code_bytes, tiles_of
from epcomm.formats.wire import WireFormat
from epcomm.native import align, combine_record, constants, dispatch_record, dtypes

# (format, H, K): payload, scales, meta, expert, row, weight, bytes, payload bytes, scale bytes.
DISPATCH = [
    ("BF16", 64, 3, (0, 128, 128, 144, 160, 176, 192, 128, 0)),
    ("F32", 64, 4, (0, 256, 256, 272, 288, 304, 320, 256, 0)),
    # 656 = 5 * 128 + 16: six tiles, 24 bytes of scales on 32; five choices on 32 bytes.
    ("FP8", 656, 5, (0, 656, 688, 704, 736, 768, 800, 656, 24)),
    # Six scale bytes are stored as two int32.
    ("FP8_UE8M0", 656, 5, (0, 656, 672, 688, 720, 752, 784, 656, 8)),
    ("FP8", 7168, 8, (0, 7168, 7392, 7408, 7440, 7472, 7504, 7168, 224)),
    ("BF16", 8, 1, (0, 16, 16, 32, 48, 64, 80, 16, 0)),
]
# (format, H, K, weights): payload bytes, scale bytes, weight, bytes; nothing between the parts.
COMBINE = [
    ("BF16", 64, 3, False, (128, 0, 128, 128)),
    ("BF16", 64, 3, True, (128, 0, 128, 144)),
    ("F32", 16, 8, True, (64, 0, 64, 96)),
    # 200 = 128 + 72: codes 128 + 72 bytes, two tiles of metadata, 208 bytes in all.
    ("LOGFMT8", 200, 3, True, (200, 8, 208, 224)),
    # 160 + 90 code bytes and 8 of metadata: 258, so the weights start at 272.
    ("LOGFMT10", 200, 3, True, (250, 8, 272, 288)),
    ("LOGFMT10", 7168, 8, False, (8960, 224, 9184, 9184)),
]
NAMES = dtypes["record"].names


@pytest.mark.parametrize(("fmt", "hidden", "num_topk", "want"), DISPATCH)
def test_dispatch_record(fmt, hidden, num_topk, want):
    record = dispatch_record(WireFormat[fmt], hidden, num_topk)
    assert tuple(getattr(record, name) for name in NAMES) == want


@pytest.mark.parametrize(("fmt", "hidden", "num_topk", "with_weights", "want"), COMBINE)
def test_combine_record(fmt, hidden, num_topk, with_weights, want):
    record = combine_record(WireFormat[fmt], hidden, num_topk, with_weights)
    assert (record.payload_bytes, record.scale_bytes, record.weight, record.bytes) == want
    assert record.scales == record.payload_bytes
    assert record.meta == record.expert == record.row == record.weight


@pytest.mark.parametrize("fmt", list(WireFormat))
@pytest.mark.parametrize("hidden", [1, 8, 127, 128, 129, 1000])
def test_records_are_aligned_and_their_parts_apart(fmt, hidden):
    for num_topk in (1, 3, 4, 256):
        record = dispatch_record(fmt, hidden, num_topk)
        parts = [record.payload, record.scales, record.meta, record.expert, record.row]
        parts += [record.weight, record.bytes]
        assert all(part % constants["limit_record_align"] == 0 for part in parts)
        choices = 4 * num_topk
        sizes = [record.payload_bytes, record.scale_bytes, 16, choices, choices, choices]
        for begin, size, end in zip(parts, sizes, parts[1:], strict=False):
            assert size <= end - begin < size + 16
        back = combine_record(fmt, hidden, num_topk, True)
        assert back.weight - back.payload_bytes - back.scale_bytes in range(16)
        assert back.bytes % 16 == 0


@pytest.mark.parametrize(
    ("fmt", "hidden", "num_topk"),
    [(99, 64, 1), (-1, 64, 1), (1, 0, 1), (1, 2**20 + 1, 1), (1, 64, 0), (1, 64, 257)],
)
def test_records_outside_the_limits(fmt, hidden, num_topk):
    with pytest.raises(ValueError, match="no record"):
        dispatch_record(fmt, hidden, num_topk)
    with pytest.raises(ValueError, match="no record"):
        combine_record(fmt, hidden, num_topk, False)


def test_structures_have_the_sizes_the_protocol_says():
    assert constants["sizeof_counter"] == 128
    assert dtypes["record_meta"].itemsize == 16
    assert dtypes["announcement"].itemsize == constants["sizeof_announcement"] == 328
    assert dtypes["record_shape"].itemsize == 16
    assert dtypes["record"].itemsize == 36
    assert dtypes["wait_state"].itemsize == 40
    local = constants["limit_max_local_ranks"]
    control = dtypes["control"]
    assert control.fields["announced"][1] == 128
    assert control.fields["aborted"][1] == 256
    assert control.fields["arrived"][1] == 384
    assert control.fields["released"][1] == 384 + 128 * local
    assert control.fields["wait"][1] == 384 + 256 * local
    assert control.fields["error"][1] == 424 + 256 * local
    assert control.itemsize == constants["sizeof_control"] == 464 + 256 * local


def test_wait_matches_the_header():
    """The one structure that Python writes out itself."""
    assert ctypes.sizeof(native.Wait) == 24
    assert [getattr(native.Wait, name).offset for name, _ in native.Wait._fields_] == [0, 8, 12, 16]


def test_fields_do_not_overlap():
    for structure, dtype in dtypes.items():
        spans = sorted((dtype.fields[n][1], dtype.fields[n][0].itemsize) for n in dtype.names)
        for (begin, size), (after, _) in itertools.pairwise(spans):
            assert begin + size <= after, structure


def test_every_field_and_enumerator_is_described():
    """What the headers declare is what Python can name."""
    folder = Path(__file__).parents[2] / "csrc/protocol"
    headers = [path for path in sorted(folder.glob("*.h")) if path.name != "fabric.h"]
    text = "".join(path.read_text() for path in headers)
    enumerators = set(re.findall(r"^\s*EPCOMM_([A-Z0-9_]+) = \d+,", text, re.M))
    assert enumerators
    assert enumerators <= set(constants)
    for body, name in re.findall(r"typedef struct \{(.*?)\} epcomm_(\w+);", text, re.S):
        fields = re.findall(r"^\s*[\w]+ (\w+)(?:\[\w+\])?;", body, re.M)
        if name != "counter":
            assert fields
            assert set(fields) - {"reserved"} == set(dtypes[name].names), name


def test_every_field_and_enumerator_of_the_fabric_is_described():
    """Likewise; triggers and heads, which Python does not touch, have no dtype."""
    path = Path(__file__).parents[2] / "csrc/protocol/fabric.h"
    enumerators = set(re.findall(r"^\s*EPCOMM_FABRIC_([A-Z0-9_]+) = \d+,", path.read_text(), re.M))
    assert enumerators
    assert enumerators <= set(fabric_abi.constants)
    checked = set()
    structures = r"typedef struct \{((?:(?!typedef).)*?)\} epcomm_(?:fabric_)?(\w+);"
    for body, name in re.findall(structures, path.read_text(), re.S):
        if name in ("trigger", "ring_producer"):
            continue
        fields = set(re.findall(r"^\s*(?:const )?[\w]+\*? (\w+)(?:\[\w+\])?;", body, re.M))
        fields = {field for field in fields if not field.startswith("reserved")}
        assert fields == set(fabric_abi.dtypes[name].names), name
        checked.add(name)
    assert {"ring", "error", "state", "fabric", "place", "proxy_thread"} <= checked


@pytest.mark.parametrize("hidden", [1, 16, 127, 128, 129, 200, 656, 7168])
def test_format_sizes_agree_with_the_definitions(hidden):
    """The C library, the constants and the reference's actual bytes."""
    assert TILE == 128
    x = np.ones((1, hidden), np.float32)
    for bits, fmt in ((8, WireFormat.LOGFMT8), (10, WireFormat.LOGFMT10)):
        assert fmt.logfmt_bits == bits
        assert fmt.payload_bytes(hidden) == logfmt_code_bytes(hidden, bits)
        assert fmt.scale_bytes(hidden) == 4 * tiles_of(hidden)
        assert reference.logfmt_encode(x, bits).nbytes == logfmt_row_bytes(hidden, bits)
    for fmt, scale_format in ((WireFormat.FP8, "f32"), (WireFormat.FP8_UE8M0, "ue8m0")):
        codes, scales = reference.fp8_encode(x, scale_format)
        assert codes.nbytes == fmt.payload_bytes(hidden)
        assert scales.nbytes == fmt.scale_bytes(hidden)
    assert WireFormat.BF16.payload_bytes(hidden) == 2 * hidden
    assert WireFormat.F32.payload_bytes(hidden) == 4 * hidden
    assert WireFormat.BF16.scale_bytes(hidden) == WireFormat.F32.scale_bytes(hidden) == 0


def test_formats_are_numbered_as_in_the_header():
    assert [f"FORMAT_{fmt.name}" for fmt in WireFormat] == [
        name for name in constants if name.startswith("FORMAT_")
    ]
    assert [int(fmt) for fmt in WireFormat] == [0, 1, 2, 3, 4, 5]


def test_align():
    assert [align(v, 16) for v in (0, 1, 15, 16, 17)] == [0, 16, 16, 16, 32]
