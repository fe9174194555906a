"""What the CUDA part of the library says about itself; needs no GPU."""

import itertools

import numpy as np
import pytest

import epcomm
from epcomm import native
from epcomm.cpu.window import dispatch_parts
from epcomm.cuda import abi

pytestmark = pytest.mark.skipif(not abi.available, reason="libepcomm was built without CUDA")


@pytest.mark.parametrize("by_expert", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 4099])
@pytest.mark.parametrize("hidden", [16, 528, 7168])
def test_windows_are_laid_out_as_on_the_cpu(hidden, rows, by_expert):
    fmt, num_topk = native.constants["FORMAT_FP8"], 5
    row = np.zeros((), abi.dtypes["row"])
    row["row_bytes"] = native.library.epcomm_payload_bytes(fmt, hidden)
    row["scale_bytes"] = native.library.epcomm_scale_bytes(fmt, hidden)
    row["num_topk"] = num_topk
    row["layout"] = native.constants["LAYOUT_EXPERT" if by_expert else "LAYOUT_RANK"]
    row["with_topk"] = row["with_weights"] = 1
    parts = np.zeros((), abi.dtypes["parts"])
    native.library.epcomm_cuda_window_parts(row.ctypes.data, rows, parts.ctypes.data)
    want = dispatch_parts(rows, int(row["row_bytes"]), int(row["scale_bytes"]), num_topk, by_expert)
    got = [int(parts[name]) for name in abi.dtypes["parts"].names or ()]
    assert got == [want.x, want.scales, want.topk, want.weights, want.source, want.nbytes]


def test_announcements_do_not_overlap():
    num_nodes, num_ranks, num_experts = 3, 6, 30
    counts = num_nodes + num_ranks + num_experts
    size = native.constants["sizeof_announcement"] + 4 * counts
    offsets = sorted(
        native.library.epcomm_cuda_announcement_offset(
            num_nodes, num_ranks, num_experts, rank, epoch
        )
        for rank in range(num_ranks)
        for epoch in (6, 7)
    )
    assert offsets[0] >= abi.dtypes["control"].itemsize
    assert all(b - a >= size for a, b in itertools.pairwise(offsets))
    total = native.library.epcomm_cuda_control_bytes(num_nodes, num_ranks, num_experts)
    counter = 128
    assert offsets[-1] + size + num_ranks * counter <= total


def test_parameter_blocks_keep_the_library_s_layout():
    call = abi.structures["dispatch"]()
    call.announcement.num_tokens = 7
    call.routes.num_tokens = 9
    call.num_warps = 11
    raw = np.frombuffer(bytes(call), abi.dtypes["dispatch"])[0]
    nested = raw["announcement"].view(native.dtypes["announcement"])
    assert nested["num_tokens"] == 7
    assert raw["routes"].view(abi.dtypes["routes"])["num_tokens"] == 9
    assert raw["num_warps"] == 11


@pytest.mark.parametrize("fixed_rows", [None, 100])
def test_memory_of_a_gpu_is_explained(fixed_rows):
    report = epcomm.Buffer.explain_memory(
        num_ranks=4,
        ranks_per_node=4,
        hidden=1024,
        num_experts=16,
        num_topk=2,
        max_tokens=512,
        backend="cuda",
        fixed_rows=fixed_rows,
    )
    rows = 4 * 512 if fixed_rows is None else fixed_rows
    received, _ = report.purposes["received rows"]
    needed = dispatch_parts(rows, 2048, 0, 2, False).nbytes
    assert 4 * 1.25 * needed <= received <= 4 * (1.25 * needed + (2 << 20))
    assert report.total > received
