"""The plan of a dispatch: base rows and counts, against rows placed one by one."""

import itertools

import numpy as np
import pytest

from epcomm.cpu.announce import Counts
from epcomm.cpu.layout import BadChoice, make_layout
from epcomm.cpu.plan import make_plan
from epcomm.topology import make_topology

PER_RANK, TOPK = 3, 4


def draw(size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Choices of every rank, some dropped; one rank has no tokens."""
    topk = []
    for rank in range(size):
        scores = rng.random((0 if rank == 1 else 3 + rank, PER_RANK * size))
        chosen = np.argsort(scores, axis=1)[:, :TOPK].astype(np.int64)
        if chosen.shape[1] < TOPK:
            chosen = np.pad(chosen, ((0, 0), (0, TOPK - chosen.shape[1])), constant_values=-1)
        topk.append(np.where(rng.random(chosen.shape) < 0.2, -1, chosen))
    return topk


def counts_of(layouts) -> Counts:
    return Counts(
        np.stack([layout.node_tokens_N for layout in layouts]),
        np.stack([layout.rank_rows_R for layout in layouts]),
        np.stack([layout.expert_rows_E for layout in layouts]),
    )


def place_by_hand(topk, size: int, by_expert: bool, alignment: int):
    """(rank, source, token, expert) -> row, and the rows of every rank."""
    rows, lengths = {}, []
    for rank in range(size):
        at = 0
        experts = range(rank * PER_RANK, (rank + 1) * PER_RANK)
        groups = [[e] for e in experts] if by_expert else [list(experts)]
        for group in groups:
            for source in range(size):
                for token, chosen in enumerate(topk[source].tolist()):
                    mine = [e for e in chosen if e in group]
                    for expert in mine:
                        rows[rank, source, token, expert] = at
                    at += bool(mine)
            at = -(-at // alignment) * alignment if by_expert else at
        lengths.append(at)
    return rows, lengths


@pytest.mark.parametrize("by_expert", [False, True])
@pytest.mark.parametrize(("size", "shape"), [(1, 1), (4, 1), (4, 2), (4, 4), (6, 3), (6, 2)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rows_are_where_they_belong(size, shape, by_expert, interleaved):
    alignment = 4 if by_expert else 1
    rng = np.random.default_rng([size, shape, by_expert])
    topk = draw(size, rng)
    nodes = size // shape
    hosts = [r % nodes if interleaved else r // shape for r in range(size)]
    topologies = [make_topology(rank, hosts, None) for rank in range(size)]
    node_of_R = np.array(topologies[0].node_of, np.int32)
    layouts = [make_layout(t, node_of_R, PER_RANK * size, by_expert) for t in topk]
    assert not any(isinstance(layout, BadChoice) for layout in layouts)
    counts = counts_of(layouts)
    rows, lengths = place_by_hand(topk, size, by_expert, alignment)
    plans = [make_plan(t, counts, by_expert, alignment) for t in topologies]
    stored = np.zeros((size, size), int)  # by rank that stores, into rank
    for (rank, source, token, expert), row in rows.items():
        via = topologies[rank].rank_of_NL[node_of_R[rank], topologies[source].local_rank]
        plan = plans[via]
        k = topk[source][token].tolist().index(expert)
        base = plan.base_NE[node_of_R[source], expert]
        assert base + layouts[source].index_TK[token, k] == row
        stored[via, rank] += 1
    if not by_expert:
        stored[:] = 0
        for rank, source, _ in {key[:3] for key in rows}:
            via = topologies[rank].rank_of_NL[node_of_R[rank], topologies[source].local_rank]
            stored[via, rank] += 1
    for rank, (plan, topology) in enumerate(zip(plans, topologies, strict=True)):
        assert plan.rows_R.tolist() == lengths
        here = topology.node_ranks
        np.testing.assert_array_equal(plan.stored_LL, stored[np.ix_(here, here)])
        tokens = [
            sum((t == e).sum() for t in topk) for e in range(rank * PER_RANK, (rank + 1) * PER_RANK)
        ]
        assert plan.tokens_per_expert.tolist() == tokens
        records = [
            sum(any(e >= 0 and node_of_R[e // PER_RANK] == topology.node for e in chosen)
                for chosen in topk[source].tolist())
            for source in topology.rail
        ]  # fmt: skip
        assert plan.records_N.tolist() == records
        written = {row for (owner, *_), row in rows.items() if owner == rank}
        padding = set(itertools.chain(*(range(a, b) for a, b in plan.padding)))
        assert written | padding == set(range(lengths[rank]))
        assert not written & padding
        away = node_of_R[np.arange(PER_RANK * size) // PER_RANK] != topology.node
        assert (plan.base_NE[:, away] == -1).all()


def test_layout_indices_count_up():
    """Index of a token among its source's rows at a rank or expert; slots among its records."""
    topk = np.array([[0, 3, -1], [2, 3, 0], [-1, -1, -1], [1, 0, 2]], np.int64)
    node_of_R = np.array([0, 1], np.int32)
    by_rank = make_layout(topk, node_of_R, 4, False)
    assert by_rank.index_TK.tolist() == [[0, 0, -1], [1, 1, 1], [-1, -1, -1], [2, 2, 2]]
    assert by_rank.slot_TN.tolist() == [[0, 0], [1, 1], [-1, -1], [2, 2]]
    assert by_rank.rank_rows_R.tolist() == [3, 3]
    assert by_rank.expert_rows_E.tolist() == [3, 1, 2, 2]
    by_expert = make_layout(topk, node_of_R, 4, True)
    assert by_expert.index_TK.tolist() == [[0, 0, -1], [0, 1, 1], [-1, -1, -1], [0, 2, 1]]
    assert by_expert.node_tokens_N.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("row", "want"),
    [([0, 4], (1, 1, False)), ([-2, 0], (1, 0, False)), ([3, 3], (1, 1, True)),
     ([2**31, 0], (1, 0, False)), ([2**32, 0], (1, 0, False))],
)  # fmt: skip
def test_bad_choice_is_the_first(row, want):
    """Also ids that would be valid if cut to 32 bits."""
    topk = np.array([[0, 1], row, [9, 9]], np.int64)
    assert make_layout(topk, np.array([0, 0], np.int32), 4, False) == BadChoice(*want)
