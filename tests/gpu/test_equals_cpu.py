"""The CPU and the CUDA back end, in one job and for the same inputs, return the same bytes."""

from dataclasses import replace

import harness
import numpy as np
import pytest
import torch
from harness import Case
from on_gpu import to_gpu
from stress import RESULT_TENSORS, on_host

from epcomm.oracle import to_bytes

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]

#: Rows of whole and of broken tiles, columns and warps.
HIDDEN = (512, 1024, 1040, 2056, 2064, 4096, 5120, 7168, 7184, 8192)
BASE = Case(1, experts_per_rank=5, num_topk=4, tokens=(33, 0, 5, 64), row_weights=True, num_bias=2)


def variants(hidden):
    """Formats and layouts that these rows can have."""
    yield replace(BASE, dtype=torch.float32, layout="expert", alignment=3)
    yield replace(BASE, num_bias=0, row_weights=False, with_weights=False)
    if hidden % 16 == 0:
        yield replace(BASE, quantize="fp8")
        yield replace(BASE, quantize="fp8_ue8m0", layout="expert", routing="skewed")
        yield replace(BASE, packed="f32", layout="expert", alignment=8, routing="sparse")
        yield replace(BASE, packed="ue8m0", fixed_rows=900)


def run(comm, case, backend):
    """Results of a dispatch, a combine and a cached dispatch, on the host."""
    place = to_gpu if backend == "cuda" else lambda value: value
    given = harness.draw_inputs(case, comm.size)[comm.rank]
    x, weights = place(given.x), place(given.topk_weights)
    with harness.make_buffer(comm, case, backend=backend) as buffer:
        got = buffer.dispatch(
            x,
            place(given.topk_idx),
            weights,
            quantize=case.quantize,
            layout=case.layout,
            alignment=case.alignment,
            fixed_rows=case.fixed_rows,
        )
        rng = np.random.default_rng([case.seed, comm.rank, 2])
        rows = got.handle.num_rows
        y = harness.draw_rows(rows, case, rng)
        shape = (rows,) if case.layout == "expert" else (rows, case.num_topk)
        row_weights, back = (torch.from_numpy(rng.random(s, np.float32)) for s in ((rows,), shape))
        tokens = len(given.topk_idx)
        out = buffer.combine(
            place(y),
            got.handle,
            weights=place(row_weights) if case.row_weights else None,
            topk_weights=place(back) if case.with_weights else None,
            bias=place(tuple(harness.draw_rows(tokens, case, rng) for _ in range(case.num_bias))),
        )
        again = buffer.dispatch(x, topk_weights=weights, quantize=case.quantize, handle=got.handle)
        results = [on_host(result) for result in (got, out, again)]
        comm.Barrier()
    return results


@pytest.mark.parametrize("hidden", HIDDEN)
def test_same_bytes(comm, hidden):
    for variant in variants(hidden):
        case = replace(variant, hidden=hidden, ranks_per_node=comm.size)
        for cpu, cuda in zip(run(comm, case, "cpu"), run(comm, case, "cuda"), strict=True):
            assert cpu.num_rows == cuda.num_rows
            for name in RESULT_TENSORS:
                mine, theirs = getattr(cpu, name), getattr(cuda, name)
                assert (mine is None) == (theirs is None), name
                if mine is not None:
                    assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), name
                    mine, theirs = (to_bytes(t.reshape(1, t.numel())) for t in (mine, theirs))
                    np.testing.assert_array_equal(mine, theirs, err_msg=f"{case}: {name}")
