import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epcomm.routing import load_expert_counts, load_trace, make_routing

DATA = Path(__file__).parent / "data"
MEGATRON = DATA / "megatron_router_trace.jsonl"


def record(**changes):
    base = {"step": 0, "layer": 3, "rank": 0, "num_tokens": 2, "topk": 2}
    merged = {**base, "top_indices": [[0, 1], [2, 3]], **changes}
    return {k: v for k, v in merged.items() if v is not ...}


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def sglang_ids(layers=3, tokens=4, topk=8, used=6, first_layer=1):
    """[layers, tokens, topk] as the recorder leaves it: -1 where nothing was written."""
    ids = np.full((layers, tokens, topk), -1, dtype=np.int32)
    for i in range(first_layer, layers):
        for t in range(tokens):
            ids[i, t, :used] = (np.arange(used) * 3 + t + i) % 32
    return ids


def refuses(path, *reasons, **options):
    """Check that the error names the file and each of the reasons."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_trace(path, **options)
    for reason in reasons:
        assert reason in str(caught.value)


def test_megatron_reads_the_decoder_records_of_a_layer():
    trace = load_trace(MEGATRON)
    assert trace.topk_idx_TK.dtype == torch.int64
    assert trace.topk_idx_TK.tolist() == [[7, 0, 4], [1, 2, 3], [2, 5, 6]]
    assert (trace.layer, trace.num_experts, trace.topk_weights_TK) == (3, None, None)
    assert trace.source == str(MEGATRON)
    other = load_trace(MEGATRON, layer=4, num_experts=8)
    assert other.topk_idx_TK.tolist() == [[5, 6, 7], [7, 6, 5]]
    assert other.num_experts == 8


def test_megatron_without_block_and_without_tokens(tmp_path):
    empty = record(num_tokens=0, top_indices=[])
    path = write_jsonl(tmp_path / "t.jsonl", empty, record())
    assert load_trace(path).topk_idx_TK.tolist() == [[0, 1], [2, 3]]
    assert load_trace(write_jsonl(path, empty)).topk_idx_TK.shape == (0, 2)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(layer=...), "'layer' is missing"),
        (record(top_indices=...), "'top_indices' is missing"),
        (record(step=...), "'step' is missing"),
        (record(topk="2"), "'topk' must be an integer"),
        (record(num_tokens=True), "'num_tokens' must be an integer"),
        (record(num_tokens=3), "num_tokens is 3, but top_indices is 2 rows"),
        (record(top_indices=7), "num_tokens is 2, but top_indices is int"),
        (record(top_indices=[[0, 1], [2]]), "row 1 is 1 entries"),
        (record(top_indices=[[0, 1], 2]), "row 1 is int"),
        (record(top_indices=[[0, 1], [2, 2]]), "token 1: expert 2 appears twice"),
        (record(top_indices=[[0, 1], [2, 8]]), "token 1: expert id 8 is out of range"),
        (record(top_indices=[[0, -2], [2, 3]]), "token 0: expert id -2 is out of range"),
        (record(top_indices=[[0, 1.0], [2, 3]]), "expected integers, got dtype float64"),
        (record(top_indices=[[0, None], [2, 3]]), "expected integers"),
        (record(top_indices=[[0, [1]], [2, 3]]), "ragged rows"),
        (record(top_indices=[[0, 2**70], [2, 3]]), "expected integers"),
        (record(topk=1, top_indices=[[0], [1]]), "topk is 1, earlier records of layer 3 have 2"),
        ([1, 2], "expected a JSON object, got list"),
    ],
)
def test_megatron_names_line_and_reason(tmp_path, bad, reason):
    path = write_jsonl(tmp_path / "t.jsonl", record(), record(layer=4), bad)
    refuses(path, "line 3: ", reason, num_experts=8)


def test_megatron_cut_short_anywhere(tmp_path):
    path = tmp_path / "t.jsonl"
    whole = "".join(json.dumps(record()) + "\n" for _ in range(2))
    first = len(whole) // 2
    for end in range(first + 1, len(whole) - 1):
        path.write_text(whole[:end])
        refuses(path, "line 2: ", "not valid JSON, or cut short")


def test_megatron_without_the_layer(tmp_path):
    refuses(MEGATRON, "no decoder records of layer 9", layer=9)
    path = tmp_path / "t.jsonl"
    path.write_text("\n")
    refuses(path, "no decoder records")
    path.write_bytes(b"\xff\xfe\x00")
    refuses(path, "not UTF-8")


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int32, np.int64])
def test_vllm_reads_a_layer(tmp_path, dtype):
    ids = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(dtype)
    path = tmp_path / "routed.npy"
    np.save(path, ids)
    assert load_trace(path).topk_idx_TK.tolist() == ids[:, 0].tolist()
    trace = load_trace(path, layer=2, num_experts=24)
    assert trace.topk_idx_TK.tolist() == ids[:, 2].tolist()
    assert trace.topk_idx_TK.dtype == torch.int64


@pytest.mark.parametrize(
    ("array", "options", "reason"),
    [
        (np.zeros((2, 3, 1)), {}, "expected integers, got dtype float64"),
        (np.zeros((2, 3, 1), bool), {}, "expected integers, got dtype bool"),
        (np.zeros((2, 3), np.int16), {}, "got shape [2, 3]"),
        (np.zeros((2, 3, 1), np.int16), {"layer": 3}, "layer must be in 0..2, got 3"),
        (np.zeros((2, 3, 1), np.int16), {"layer": -1}, "layer must be in 0..2, got -1"),
        (np.zeros((2, 3, 2), np.int16), {"layer": 1}, "layer 1: token 0: expert 0 appears twice"),
        (np.full((2, 3, 1), 9, np.int16), {"num_experts": 9}, "token 0: expert id 9"),
        (np.full((2, 3, 1), -2, np.int16), {}, "expert id -2"),
        (np.full((2, 3, 1), 2**63, np.uint64), {}, "out of range"),
    ],
)
def test_vllm_names_the_reason(tmp_path, array, options, reason):
    path = tmp_path / "routed.npy"
    np.save(path, array)
    refuses(path, reason, **options)


def test_vllm_cut_short_and_pickled(tmp_path):
    path = tmp_path / "routed.npy"
    np.save(path, np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    whole = path.read_bytes()
    for end in (0, 5, 40, len(whole) - 1):
        path.write_bytes(whole[:end])
        refuses(path, "cut short")
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refuses(path, "not an .npy file")


def sglang_dump(path, records, **extra):
    torch.save({"records": records, **extra}, path)
    return path


def sglang_record(i, ids):
    return {
        "forward_pass_id": i,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": list(range(ids.shape[1])),
        "topk_ids_of_layer": torch.from_numpy(ids),
        "misc_objects": [{"layer_id": 1}],
    }


def test_sglang_reads_the_records_of_a_dump(tmp_path):
    parts = [sglang_ids(tokens=4), sglang_ids(tokens=0), sglang_ids(tokens=2)]
    records = [sglang_record(i, ids) for i, ids in enumerate(parts)]
    mapping = torch.arange(40).repeat(3, 1)
    path = sglang_dump(tmp_path / "e.pt", records, last_physical_to_logical_map=mapping)
    trace = load_trace(path)
    # Layer 0 recorded nothing, two of the eight columns are unused.
    assert trace.layer == 1
    assert trace.num_experts == 40
    expected = np.concatenate([ids[1, :, :6] for ids in parts])
    assert trace.topk_idx_TK.tolist() == expected.tolist()
    assert load_trace(path, layer=2).topk_idx_TK[0].tolist() == parts[0][2, 0, :6].tolist()
    refuses(path, "layer 0 has no recorded tokens", layer=0)
    refuses(path, "layer must be in 0..2, got 3", layer=3)


def test_sglang_reads_json_and_arrays(tmp_path):
    ids = sglang_ids()
    in_json = tmp_path / "e.json"
    in_json.write_text(json.dumps({"topk_ids_of_layer": ids.tolist()}))
    in_records = tmp_path / "r.json"
    in_records.write_text(json.dumps({"records": [{"topk_ids_of_layer": ids.tolist()}]}))
    in_npy = tmp_path / "e.npy"
    np.save(in_npy, ids)
    bare = tmp_path / "e.pt"
    torch.save(torch.from_numpy(ids), bare)
    for path in (in_json, in_records, in_npy, bare):
        trace = load_trace(path, format="sglang")
        assert trace.topk_idx_TK.tolist() == ids[1, :, :6].tolist()


def change(ids, layer, token, slot, value):
    ids = ids.copy()
    ids[layer, token, slot] = value
    return ids


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([], "'records' is missing or empty"),
        ([{"global_physical_count": torch.zeros(3)}], "records[0]: field 'topk_ids_of_layer'"),
        ([sglang_record(0, sglang_ids()[0])], "records[0]: topk_ids_of_layer: expected [layers"),
        ([sglang_record(0, sglang_ids().astype(np.float32))], "got dtype float32"),
        ([sglang_record(0, sglang_ids(tokens=0))], "no record has tokens"),
        (
            [sglang_record(0, sglang_ids()), sglang_record(1, sglang_ids(layers=4))],
            "records[1]: shape [4, 4, 8] does not fit",
        ),
        (
            [sglang_record(0, sglang_ids()), sglang_record(1, change(sglang_ids(), 1, 2, 0, 32))],
            "records[1]: layer 1: token 2: expert id 32 is out of range",
        ),
        ([sglang_record(0, change(sglang_ids(), 1, 0, 0, 4))], "token 0: expert 4 appears twice"),
    ],
)
def test_sglang_names_place_and_reason(tmp_path, records, reason):
    refuses(sglang_dump(tmp_path / "e.pt", records), reason, num_experts=32)


def test_sglang_cut_short(tmp_path):
    path = sglang_dump(tmp_path / "e.pt", [sglang_record(0, sglang_ids())])
    whole = path.read_bytes()
    for end in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        refuses(path, "cut short")
    in_json = tmp_path / "e.json"
    in_json.write_text('{"records": [\n{"topk_ids')
    refuses(in_json, "line 2: not valid JSON")
    in_json.write_text('{"topk_ids_of_layer": [[[1, 2], [3]]]}')
    refuses(in_json, "ragged rows")
    in_json.write_text("[" * 100_000)
    refuses(in_json, "line 1: not readable JSON")


class Mischief:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_is_not_executed(tmp_path, capsys):
    path = tmp_path / "e.pt"
    torch.save({"records": Mischief()}, path)
    refuses(path, "not a torch file of tensors and plain values")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("steps", [None, 2])
def test_counts_of_a_recording(tmp_path, steps):
    counts = np.array([[0, 0, 0], [5, 1, 3]])
    stored = counts if steps is None else np.stack([counts] * steps)
    in_json, in_pt = tmp_path / "c.json", tmp_path / "c.pt"
    in_json.write_text(json.dumps({"logical_count": stored.tolist()}))
    torch.save({"rank": 0, "logical_count": torch.from_numpy(stored)}, in_pt)
    for path in (in_json, in_pt):
        assert load_expert_counts(path).tolist() == (counts * (steps or 1)).tolist()
        refuses(path, "counts without tokens")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "'logical_count' is missing"),
        ([[1]], "'logical_count' is missing"),
        ({"logical_count": [1, 2]}, r"got shape \[2\]"),
        ({"logical_count": [[1, 2], [3]]}, "ragged"),
        ({"logical_count": [[1, -2]]}, "negative count -2"),
        ({"logical_count": [[1.5, 2]]}, "expected integers"),
    ],
)
def test_bad_counts_files_are_refused(tmp_path, content, reason):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=reason):
        load_expert_counts(path)


def test_unknown_format_and_missing_file(tmp_path):
    refuses(tmp_path / "trace.csv", "format must be one of")
    refuses(MEGATRON, "format must be one of", format="csv")
    with pytest.raises(ValueError, match="num_experts"):
        load_trace(MEGATRON, num_experts=0)
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "none.jsonl")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_is_a_value_error_or_a_legal_file(tmp_path_factory, data):
    """Overwriting or dropping bytes never ends in another exception."""
    path = tmp_path_factory.getbasetemp() / data.draw(st.sampled_from(["d.jsonl", "d.npy", "d.pt"]))
    if path.suffix == ".jsonl":
        write_jsonl(path, record(), record())
    elif path.suffix == ".npy":
        np.save(path, np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    else:
        sglang_dump(path, [sglang_record(0, sglang_ids())])
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=4))
    path.write_bytes(raw)
    try:
        trace = load_trace(path, num_experts=64)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017  which of the two it is, is the question
    else:
        assert trace.topk_idx_TK.max() < 64


def test_make_routing_replays_a_trace(tmp_path):
    routing = make_routing(f"trace:{MEGATRON}", 5, 8, 3, seed=1)
    rows = load_trace(MEGATRON).topk_idx_TK.tolist()
    start = rows.index(routing.topk_idx_TK[0].tolist())
    assert routing.topk_idx_TK.tolist() == [rows[(start + i) % 3] for i in range(5)]
    assert routing.topk_weights_TK.dtype == torch.float32
    assert (routing.topk_weights_TK == 1 / 3).all()
    firsts = [make_routing(f"trace:{MEGATRON}", 1, 8, 3, seed=s).topk_idx_TK for s in range(20)]
    assert len({tuple(ids[0].tolist()) for ids in firsts}) == 3
    layer_4 = make_routing(f"trace:{MEGATRON}:4", 1, 8, 3)
    assert sorted(layer_4.topk_idx_TK[0].tolist()) == [5, 6, 7]
    with pytest.raises(ValueError, match="num_topk must be 3"):
        make_routing(f"trace:{MEGATRON}", 5, 8, 2)
    with pytest.raises(ValueError, match="out of range"):
        make_routing(f"trace:{MEGATRON}", 5, 7, 3)
    empty = write_jsonl(tmp_path / "t.jsonl", record(num_tokens=0, top_indices=[]))
    assert make_routing(f"trace:{empty}", 0, 8, 2).num_tokens == 0
    with pytest.raises(ValueError, match="no tokens"):
        make_routing(f"trace:{empty}", 1, 8, 2)


def test_replayed_empty_slots_weigh_nothing(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", record(top_indices=[[3, -1], [-1, -1]]))
    routing = make_routing(f"trace:{path}", 2, 8, 2)
    by_row = dict(
        zip(
            map(tuple, routing.topk_idx_TK.tolist()),
            routing.topk_weights_TK.tolist(),
            strict=True,
        )
    )
    assert by_row == {(3, -1): [1.0, 0.0], (-1, -1): [0.0, 0.0]}
