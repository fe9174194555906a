"""Several virtual nodes on the GPUs of one machine: the two-hop path equals the oracle."""

import os
import time
from dataclasses import replace

import pytest
import torch
from harness import Case
from on_gpu import bound_for, check, make_buffer, varied
from oracle_cases import CASES, LARGE

import epcomm

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]

#: Ranks per node, ranks.
SHAPES = [(1, 2), (2, 4), (3, 6), (2, 6), (4, 8), (2, 8), (1, 8)]
shapes = pytest.mark.parametrize(("ranks_per_node", "num_ranks"), SHAPES)
#: Triggers and copies by another process; mlx5 requests of the kernels to emulated network cards.
FABRICS = os.environ.get("EPCOMM_TEST_FABRICS", "proxy/local,emulated").split(",")
fabrics = pytest.mark.parametrize("fabric", FABRICS)


@fabrics
@shapes
@pytest.mark.parametrize("name", CASES)
def test_equals_oracle(world, name, ranks_per_node, num_ranks, fabric):
    comm = world(num_ranks)
    case = replace(CASES[name], ranks_per_node=ranks_per_node)
    with make_buffer(comm, case, fabric=fabric) as buffer:
        check(comm, case, buffer)


@fabrics
@shapes
@pytest.mark.parametrize("name", LARGE)
def test_rows_of_real_size_equal_oracle(world, name, ranks_per_node, num_ranks, fabric):
    comm = world(num_ranks)
    case = replace(LARGE[name], ranks_per_node=ranks_per_node)
    with make_buffer(comm, case, fabric=fabric) as buffer:
        check(comm, case, buffer, in_place=True)


@fabrics
@shapes
def test_changing_sizes_and_routings(world, ranks_per_node, num_ranks, fabric):
    # Slots and signals are used again by calls of other formats and sizes, without a barrier.
    comm = world(num_ranks)
    case = replace(CASES["bf16"], ranks_per_node=ranks_per_node, hidden=256, tokens=(300,))
    with make_buffer(comm, case, fabric=fabric) as buffer:
        for seed in range(16):
            one = varied(case, seed, comm.size, (37, 113))
            if seed % 3 == 2:
                one = replace(one, dtype=torch.float32, num_bias=1)
            if seed % 4 == 3:
                one = replace(one, wire="logfmt8" if seed % 8 == 3 else "logfmt10")
            check(comm, one, buffer)


@fabrics
@shapes
@pytest.mark.parametrize("records", [4, 9, 64])
def test_bounded_staging_equals_oracle(world, records, ranks_per_node, num_ranks, fabric):
    # One chunk of four records a node, two, and four of sixteen.
    comm = world(num_ranks)
    case = replace(CASES["bf16"], ranks_per_node=ranks_per_node, hidden=256, tokens=(300,))
    bound = bound_for(case, num_ranks, records)
    with make_buffer(comm, case, fabric=fabric, max_staging_bytes=bound) as buffer:
        for seed in range(8):
            check(comm, varied(case, seed, comm.size, (37, 113)), buffer)


@fabrics
@shapes
@pytest.mark.parametrize("name", LARGE)
def test_bounded_rows_of_real_size_equal_oracle(world, name, ranks_per_node, num_ranks, fabric):
    comm = world(num_ranks)
    case = replace(LARGE[name], ranks_per_node=ranks_per_node)
    bound = bound_for(case, num_ranks, 16)
    with make_buffer(comm, case, fabric=fabric, max_staging_bytes=bound) as buffer:
        check(comm, case, buffer, in_place=True)


@fabrics
def test_bound_below_one_chunk_is_refused(world, fabric):
    comm = world(4)
    case = replace(CASES["bf16"], ranks_per_node=2, tokens=(300,))
    needed = bound_for(case, 4, 4)
    # More than half of a GPU: the buffer that was not made must not hold its SMs.
    sms = torch.cuda.get_device_properties(0).multi_processor_count // 4 - 4
    options = {"fabric": fabric, "num_sms": sms}
    with pytest.raises(ValueError, match=f"max_staging_bytes: {needed - 1} .* take {needed} bytes"):
        make_buffer(comm, case, **options, max_staging_bytes=needed - 1)
    with make_buffer(comm, case, **options, max_staging_bytes=needed) as buffer:
        check(comm, case, buffer)


@fabrics
@pytest.mark.parametrize("num_sms", [1, 3])
def test_any_number_of_sms(world, num_sms, fabric):
    comm = world(4)
    case = replace(LARGE["bf16 to fp8"], ranks_per_node=2, tokens=(70, 3, 1))
    with make_buffer(comm, case, fabric=fabric, num_sms=num_sms) as buffer:
        check(comm, case, buffer)


@fabrics
@pytest.mark.parametrize(("ranks_per_node", "num_ranks"), [(2, 4), (1, 8)])
@pytest.mark.parametrize("hidden", [7168, 2056])
@pytest.mark.parametrize("wire", ["logfmt8", "logfmt10"])
def test_logfmt_of_any_magnitude(world, wire, hidden, ranks_per_node, num_ranks, fabric):
    # Whole tiles, and a row that ends within one; subnormals, which no operation may flush.
    comm = world(num_ranks)
    case = Case(
        *(ranks_per_node, hidden),
        experts_per_rank=8,
        num_topk=8,
        tokens=(60, 0, 21),
        wire=wire,
        values="any magnitude",
    )
    with make_buffer(comm, case, fabric=fabric) as buffer:
        check(comm, case, buffer, in_place=True)
        check(comm, replace(case, dtype=torch.float32, row_weights=True, seed=1), buffer)


@fabrics
@pytest.mark.parametrize("wire", ["logfmt8", "logfmt10"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_spoil_their_tile_only(world, wire, value, fabric):
    comm = world(2)
    case = Case(1, hidden=144, experts_per_rank=1, num_topk=1, tokens=(2,))
    with make_buffer(comm, case, fabric=fabric) as buffer:
        x = torch.ones(2, case.hidden, device="cuda", dtype=torch.bfloat16)
        far = torch.full((2, 1), (comm.rank + 1) % 2, device="cuda")
        got = buffer.dispatch(x, far)
        y = torch.ones_like(got.x)
        y[got.source[:, 1] == 1, 3] = value
        back = buffer.combine(y, got.handle, wire=wire).x.float()
        assert (back[0] == 1).all()
        assert torch.isnan(back[1, :128]).all()
        assert (back[1, 128:] == 1).all()
        check(comm, case, buffer)


@fabrics
def test_bad_id_on_another_node_is_refused_everywhere(world, fabric):
    comm = world(4)
    case = replace(CASES["bf16"], ranks_per_node=2)
    with make_buffer(comm, case, fabric=fabric) as buffer:
        x = torch.randn(8, case.hidden, device="cuda", dtype=torch.bfloat16)
        topk_idx = torch.rand(8, 16, device="cuda").topk(case.num_topk).indices
        if comm.rank == 3:
            topk_idx[5, 1] = 16
        expected = ValueError if comm.rank == 3 else epcomm.PeerError
        with pytest.raises(expected, match="topk_idx"):
            buffer.dispatch(x, topk_idx)
        check(comm, case, buffer)


@fabrics
@pytest.mark.parametrize("silent", [1, 3])
def test_silent_rank_is_named_on_every_node(world, silent, fabric):
    comm = world(4)
    case = replace(CASES["bf16"], ranks_per_node=2)
    buffer = make_buffer(comm, case, fabric=fabric, timeout=2.0)
    x = torch.randn(8, case.hidden, device="cuda", dtype=torch.bfloat16)
    topk_idx = torch.rand(8, 16, device="cuda").topk(case.num_topk).indices
    if comm.rank != silent:
        begin = time.monotonic()
        with pytest.raises(epcomm.PeerTimeoutError) as caught:
            buffer.dispatch(x, topk_idx)
        assert caught.value.ranks == (silent,)
        assert time.monotonic() - begin < 10.0
    comm.Barrier()
    buffer.close()
    with make_buffer(comm, case, fabric=fabric) as fresh:
        check(comm, case, fresh)


#: The same cards with proxy threads between them and the kernels, and with all that a right program
#: does not notice.
PROXIED = (
    "proxy/emulated",
    "proxy/emulated planes=2 seed=1 delay=50 late_fetch=20 lost_doorbell=50 pieces=50 "
    "late_completion=50",
)


@pytest.mark.parametrize("fabric", PROXIED)
@pytest.mark.parametrize(("ranks_per_node", "num_ranks"), [(1, 2), (2, 4), (2, 8)])
@pytest.mark.parametrize("name", ["bf16", "bf16 to fp8", "expert layout"])
def test_proxies_over_emulated_cards(world, name, ranks_per_node, num_ranks, fabric):
    comm = world(num_ranks)
    case = replace(LARGE[name], ranks_per_node=ranks_per_node)
    bound = bound_for(case, num_ranks, 16) if name == "bf16" else None
    with make_buffer(comm, case, fabric=fabric, max_staging_bytes=bound) as buffer:
        for _ in range(3):
            check(comm, case, buffer)


def test_killed_queue_pairs_end_proxied_calls_with_the_reason(world):
    # Two requests an announcement, two a chunk: the second call meets the fifth.
    comm = world(2)
    case = replace(CASES["bf16"], ranks_per_node=1)
    buffer = make_buffer(comm, case, fabric="proxy/emulated kill=4", timeout=5.0)
    x = torch.randn(8, case.hidden, device="cuda", dtype=torch.bfloat16)
    topk_idx = torch.rand(8, 8, device="cuda").topk(case.num_topk).indices

    def dispatch_often():
        for _ in range(4):
            buffer.dispatch(x, topk_idx)

    begin = time.monotonic()
    with pytest.raises(epcomm.EpcommError) as caught:
        dispatch_often()
    assert time.monotonic() - begin < 15.0
    reasons = comm.allgather(str(caught.value))
    buffer.close()
    assert any("flushed" in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("failover=1", "failover: expected 0"),
        ("planes=9", "planes: expected 1 to 8, got 9"),
        ("color=1", '"color=1" is not one of rate='),
    ],
)
def test_bad_options_of_proxied_cards_are_refused(world, options, words):
    comm = world(2)
    case = replace(CASES["bf16"], ranks_per_node=1)
    with pytest.raises(epcomm.FabricError, match=words):
        make_buffer(comm, case, fabric=f"proxy/emulated {options}", num_sms=2)


@fabrics
def test_tokens_cross_once_per_node(world, fabric):
    comm = world(4)
    case = Case(2, hidden=512, experts_per_rank=4, num_topk=4, tokens=(100,))
    with make_buffer(comm, case, fabric=fabric) as buffer:
        x = torch.randn(100, case.hidden, device="cuda", dtype=torch.bfloat16)
        topk_idx = torch.rand(100, 16, device="cuda").topk(4).indices
        got = buffer.dispatch(x, topk_idx)
        other = topk_idx // 8 != comm.rank // 2
        assert got.traffic.records == int(other.any(dim=1).sum())
        back = buffer.combine(got.x, got.handle)
        assert back.traffic.scale_out.payload_bytes == back.traffic.records * 2 * case.hidden
