"""A call's parameters as the two-hop kernels take them; needs the library's CUDA part, no GPU."""

import ctypes

import numpy as np
import pytest

from epcomm import native
from epcomm.backend import Config
from epcomm.cuda import abi
from epcomm.native import combine_record, constants, dispatch_record

if not abi.available:
    pytest.skip("libepcomm was built without CUDA", allow_module_level=True)

from epcomm.cuda.two_hop import Hops, TwoHopBlocks

CONFIG = Config(hidden=256, num_experts=16, num_topk=5, max_tokens=10)


def make_blocks():
    rail = np.zeros((), abi.dtypes["rail"])
    rail["send"], rail["dealt"] = 1234, 5678
    hops = np.zeros((), abi.dtypes["hops"])
    hops["base"], hops["num_keys"] = 99, 7
    return TwoHopBlocks(CONFIG, rail), Hops({}, hops)


def read(address, name):
    dtype = abi.dtypes[f"two_hop_{name}"]
    return np.frombuffer(ctypes.string_at(address, dtype.itemsize), dtype)[0]


def part(block, field, dtype):
    return block[field].view(dtype)[0]


@pytest.mark.parametrize("announce", [0, 1])
def test_dispatch_carries_all_parts(announce):
    blocks, hops = make_blocks()
    call = abi.structures["dispatch"]()
    call.announcement.format = constants["FORMAT_FP8"]
    call.announce, call.x, call.num_warps = announce, 4711, 8
    block = read(blocks.extend("dispatch", call, hops), "dispatch")
    inner = part(block, "call", abi.dtypes["dispatch"])
    assert (inner["x"], inner["num_warps"]) == (4711, 16)
    assert part(inner, "routes", abi.dtypes["routes"])["max_dests"] == CONFIG.num_topk
    assert part(block, "rail", abi.dtypes["rail"])["dealt"] == 5678
    assert part(block, "hops", abi.dtypes["hops"])["num_keys"] == 7
    record = part(block, "record", native.dtypes["record"])
    want = dispatch_record(constants["FORMAT_FP8"], 256, 5)
    assert {name: record[name] for name in record.dtype.names} == vars(want)
    # Only a first dispatch learns where forwarded rows go.
    assert block["forward_list"] == (not announce)


def test_records_of_a_combine_follow_wire_and_weights():
    blocks, hops = make_blocks()
    call = abi.structures["combine"]()
    for wire in ("BF16", "F32"):
        for weights in (True, False):
            call.announcement.wire = constants[f"FORMAT_{wire}"]
            call.announcement.with_weights = weights
            block = read(blocks.extend("combine", call, hops), "combine")
            record = part(block, "record", native.dtypes["record"])
            want = combine_record(constants[f"FORMAT_{wire}"], 256, 5, weights)
            assert record["bytes"] == want.bytes


def test_a_refusal_names_no_routes():
    blocks, hops = make_blocks()
    call = abi.structures["dispatch"]()
    call.num_warps = 1
    blocks.extend("dispatch", call, hops)
    call = abi.structures["dispatch"]()
    call.num_warps = 1
    block = read(blocks.extend("dispatch", call, None), "dispatch")
    assert not part(block, "hops", abi.dtypes["hops"])["base"]
    assert part(block, "call", abi.dtypes["dispatch"])["num_warps"] == 1


def test_parameters_fit_a_launch():
    # Kernels of sm_80 built by any toolkit take 4 KiB.
    for name in ("layout", "dispatch", "combine"):
        assert abi.dtypes[f"two_hop_{name}"].itemsize <= 4096
