"""The CUDA back end equals the oracle, byte for byte, and so the CPU back end."""

from dataclasses import replace

import harness
import pytest
import torch
from on_gpu import check, make_buffer, to_gpu, to_host
from oracle_cases import CASES, LARGE

from epcomm import oracle

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]


@pytest.mark.parametrize("name", CASES)
def test_equals_oracle(comm, name):
    case = replace(CASES[name], ranks_per_node=comm.size)
    with make_buffer(comm, case) as buffer:
        check(comm, case, buffer)


@pytest.mark.parametrize("name", LARGE)
def test_rows_of_real_size_equal_oracle(comm, name):
    case = replace(LARGE[name], ranks_per_node=comm.size)
    with make_buffer(comm, case) as buffer:
        check(comm, case, buffer, in_place=True)


@pytest.mark.parametrize("num_sms", [1, 2, 5])
def test_any_number_of_sms(comm, num_sms):
    case = replace(LARGE["bf16 to fp8"], ranks_per_node=comm.size, tokens=(70, 3, 1))
    with make_buffer(comm, case, num_sms=num_sms) as buffer:
        check(comm, case, buffer)


@pytest.mark.parametrize("num_topk", range(1, 17))
def test_every_top_k(comm, num_topk):
    case = replace(
        CASES["bf16"], ranks_per_node=comm.size, experts_per_rank=16, num_topk=num_topk, num_bias=1
    )
    with make_buffer(comm, case) as buffer:
        check(comm, case, buffer)
        check(comm, replace(case, layout="expert", alignment=3), buffer)


def test_infinities_and_nans_survive_packing(comm):
    # Every rank draws the inputs of all, so it can put the same values into them.
    case = replace(LARGE["bf16 to fp8"], ranks_per_node=comm.size, tokens=(8,))
    draw = harness.draw_rows

    def with_specials(rows, case, rng):
        x = draw(rows, case, rng)
        if rows:
            x[0, :4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
            x[-1, :] = 0.0
            x[rows // 2, :] = float("inf")
        return x

    harness.draw_rows = with_specials
    try:
        with make_buffer(comm, case) as buffer:
            inputs = harness.draw_inputs(case, comm.size)
            received = oracle.dispatch(inputs, harness.make_world(case, comm.size))
            mine = inputs[comm.rank]
            got = buffer.dispatch(
                to_gpu(mine.x), to_gpu(mine.topk_idx), to_gpu(mine.topk_weights), quantize="fp8"
            )
            harness.assert_received(to_host(got), received[comm.rank])
    finally:
        harness.draw_rows = draw
