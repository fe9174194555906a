"""Byte accounting against a brute-force count, and the three savings it makes visible."""

from dataclasses import replace

import pytest
import torch
from harness import Case, draw_inputs, make_buffer, nodes_of

import epcomm
from epcomm.routing import make_routing

CASE = Case(1, hidden=256, experts_per_rank=5, num_topk=4, tokens=(11, 0, 23))


def node(case: Case, rank: int) -> int:
    return rank // case.ranks_per_node


def homes(case: Case, topk_idx: torch.Tensor) -> list[set[int]]:
    """For each token the ranks that hold its experts."""
    return [{e // case.experts_per_rank for e in row if e >= 0} for row in topk_idx.tolist()]


def entries(case: Case, topk_idx: torch.Tensor) -> list[list[int]]:
    """For each token the rank of every choice."""
    return [[e // case.experts_per_rank for e in row if e >= 0] for row in topk_idx.tolist()]


def rows_to(case: Case, topk_idx: torch.Tensor) -> list[list[int]]:
    """For each token the ranks that get a row, once per row."""
    if case.layout == "expert":
        return entries(case, topk_idx)
    return [sorted(ranks) for ranks in homes(case, topk_idx)]


def stored_in_node(case: Case, inputs, me: int) -> int:
    """Rows that ``me`` writes into other ranks of its node: its own and its rail peers'."""
    count = 0
    for source, given in enumerate(inputs):
        if source % case.ranks_per_node == me % case.ranks_per_node:
            for ranks in rows_to(case, given.topk_idx):
                count += sum(r != me and node(case, r) == node(case, me) for r in ranks)
    return count


def records_from(case: Case, topk_idx: torch.Tensor, me: int) -> int:
    """(Token, other node) pairs."""
    nodes = [{node(case, r) for r in ranks} - {node(case, me)} for ranks in homes(case, topk_idx)]
    return sum(map(len, nodes))


def total(case: Case, ranks_of_tokens: list[list[int]], me: int, far: bool) -> int:
    """Rows to other ranks, on other nodes or on this one."""
    return sum(
        r != me and (node(case, r) != node(case, me)) == far
        for ranks in ranks_of_tokens
        for r in ranks
    )


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("quantize", [None, "fp8", "fp8_ue8m0"])
def test_dispatch_counts_what_it_moves(comm, quantize, layout):
    row_bytes = {None: 512, "fp8": 256 + 8, "fp8_ue8m0": 256 + 4}[quantize]
    for shape in nodes_of(comm.size):
        case = replace(CASE, ranks_per_node=shape, quantize=quantize, layout=layout)
        inputs = draw_inputs(case, comm.size)
        given, me = inputs[comm.rank], comm.rank
        with make_buffer(comm, case) as buffer:
            recv = buffer.dispatch(
                given.x, given.topk_idx, given.topk_weights, quantize=quantize, layout=layout
            )
            traffic = recv.traffic
            stored = stored_in_node(case, inputs, me)
            records = records_from(case, given.topk_idx, me)
            assert traffic.records == records
            assert traffic.scale_up.messages == stored
            assert traffic.scale_up.payload_bytes == stored * row_bytes
            assert traffic.scale_out.payload_bytes == records * row_bytes
            others = comm.size // shape - 1
            assert traffic.scale_out.messages <= 2 * others
            assert (traffic.scale_out.metadata_bytes == 0) == (others == 0)
            assert (traffic.scale_up.metadata_bytes == 0) == (shape == 1)
            by_rank = [sorted(ranks) for ranks in homes(case, given.topk_idx)]
            by_expert = entries(case, given.topk_idx)
            link = epcomm.LinkBytes
            near, far = (total(case, by_rank, me, f) for f in (False, True))
            assert traffic.alternatives["per_rank"] == link(near * row_bytes, far * row_bytes)
            assert traffic.alternatives["per_rank_bf16"] == link(near * 512, far * 512)
            near, far = (total(case, by_expert, me, f) for f in (False, True))
            assert traffic.alternatives["per_expert"] == link(near * row_bytes, far * row_bytes)
            assert traffic.alternatives["per_node_bf16"] == link(stored * 512, records * 512)


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("wire", ["bf16", "f32", "logfmt8", "logfmt10"])
def test_combine_counts_what_it_moves(comm, wire, layout):
    """A rank reads its node's rows of its own tokens and of its rail peers', and sends those."""
    record_bytes = {"bf16": 512, "f32": 1024, "logfmt8": 256 + 8, "logfmt10": 320 + 8}[wire]
    for shape in nodes_of(comm.size):
        case = replace(CASE, ranks_per_node=shape, layout=layout)
        inputs, me = draw_inputs(case, comm.size), comm.rank
        given = inputs[me]
        with make_buffer(comm, case) as buffer:
            recv = buffer.dispatch(given.x, given.topk_idx, given.topk_weights, layout=layout)
            traffic = buffer.combine(recv.x, recv.handle, wire=wire).traffic
            read = stored_in_node(case, inputs, me)
            assert traffic.scale_up.messages == read
            assert traffic.scale_up.payload_bytes == read * 512
            sent = sum(
                node(case, me) in {node(case, r) for r in ranks}
                for source, other in enumerate(inputs)
                if source % shape == me % shape and node(case, source) != node(case, me)
                for ranks in homes(case, other.topk_idx)
            )
            assert traffic.records == sent
            assert traffic.scale_out.payload_bytes == sent * record_bytes


def test_cached_dispatch_moves_the_same_rows(comm):
    for shape in nodes_of(comm.size):
        case = replace(CASE, ranks_per_node=shape)
        given = draw_inputs(case, comm.size)[comm.rank]
        with make_buffer(comm, case) as buffer:
            first = buffer.dispatch(given.x, given.topk_idx, given.topk_weights)
            again = buffer.dispatch(given.x, topk_weights=given.topk_weights, handle=first.handle)
            assert again.traffic == first.traffic


def test_a_token_crosses_once_per_node(comm):
    """With every expert chosen, flat schemes send a row per rank or expert; epcomm one per node."""
    shape = nodes_of(comm.size)[-1 if comm.size < 4 else 1]
    per_rank = 2
    case = Case(shape, hidden=128, experts_per_rank=per_rank, num_topk=per_rank * comm.size)
    with make_buffer(comm, case) as buffer:
        topk_idx = torch.arange(case.num_topk).repeat(5, 1)
        x = torch.zeros(5, 128, dtype=torch.bfloat16)
        traffic = buffer.dispatch(x, topk_idx).traffic
        others = comm.size // shape - 1
        assert traffic.records == 5 * others
        out = traffic.scale_out.payload_bytes
        assert traffic.alternatives["per_rank"].scale_out == shape * out
        assert traffic.alternatives["per_expert"].scale_out == shape * per_rank * out


def test_the_gate_bounds_the_nodes_of_a_token(comm):
    """Limited to M groups, with a group a node, a token has records for at most M nodes."""
    case = Case(1, hidden=64, experts_per_rank=8, num_topk=4, tokens=(64,))
    experts = case.num_experts(comm.size)
    with make_buffer(comm, case) as buffer:
        means = []
        for topk_groups in sorted({1, (comm.size + 1) // 2, comm.size}):
            topk_idx = make_routing(
                "gate",
                64,
                experts,
                4,
                seed=comm.rank,
                num_groups=comm.size,
                topk_groups=topk_groups,
            ).topk_idx_TK.to(torch.int64)
            layout = buffer.get_dispatch_layout(topk_idx)
            assert int(layout.is_token_in_rank.sum(1).max()) <= topk_groups
            x = torch.zeros(64, 64, dtype=torch.bfloat16)
            traffic = buffer.dispatch(x, topk_idx).traffic
            assert traffic.records <= 64 * topk_groups
            means.append(traffic.records)
        assert means == sorted(means)


@pytest.mark.parametrize(("quantize", "scales"), [("fp8", 4), ("fp8_ue8m0", 1)])
def test_fp8_is_half_of_bf16(comm, quantize, scales):
    """Per 128 elements 128 bytes and a scale, instead of 256 bytes."""
    case = replace(CASE, hidden=512)
    given = draw_inputs(case, comm.size)[comm.rank]
    with make_buffer(comm, case) as buffer:
        bf16 = buffer.dispatch(given.x, given.topk_idx).traffic
        fp8 = buffer.dispatch(given.x, given.topk_idx, quantize=quantize).traffic
        assert fp8.records == bf16.records
        half = bf16.scale_out.payload_bytes // 2
        assert fp8.scale_out.payload_bytes == half + bf16.records * 4 * scales
        assert fp8.alternatives["per_rank_bf16"] == bf16.alternatives["per_rank"]


def test_layout_counts_match_brute_force(comm):
    for shape in nodes_of(comm.size):
        case = replace(CASE, ranks_per_node=shape)
        topk_idx = draw_inputs(case, comm.size)[comm.rank].topk_idx
        with make_buffer(comm, case) as buffer:
            for ids in (topk_idx, topk_idx.to(torch.int32)):
                layout = buffer.get_dispatch_layout(ids)
                ranks = homes(case, topk_idx)
                experts = [e for row in topk_idx.tolist() for e in row if e >= 0]
                assert layout.tokens_per_expert.tolist() == [
                    experts.count(e) for e in range(buffer.config.num_experts)
                ]
                assert layout.tokens_per_rank.tolist() == [
                    sum(r in found for found in ranks) for r in range(comm.size)
                ]
                assert layout.tokens_per_node.tolist() == [
                    sum(n in {node(case, r) for r in found} for found in ranks)
                    for n in range(buffer.num_nodes)
                ]
                assert layout.is_token_in_rank.tolist() == [
                    [r in found for r in range(comm.size)] for found in ranks
                ]
