"""The flat alternative does what epcomm does on a single node, bit for bit."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.flat import Buffers, FlatCase
from benchmarks.options import Shape, parse
from benchmarks.workload import Inputs, make_inputs
from epcomm import oracle
from epcomm.formats.wire import WireFormat


class _Mailbox:
    """An all-to-all between threads: everyone shows what it sends, and takes its part."""

    name = "threads"

    def __init__(self, rank: int, shown: list[Any], barrier: threading.Barrier) -> None:
        self.rank = rank
        self._shown = shown
        self._barrier = barrier

    def _show(self, item: Any) -> list[Any]:
        self._shown[self.rank] = item
        self._barrier.wait(30)
        seen = list(self._shown)
        self._barrier.wait(30)
        return seen

    def counts(self, send_R: np.ndarray) -> np.ndarray:
        return np.array([sent[self.rank] for sent in self._show(send_R)])

    def rows(
        self, send: torch.Tensor, send_R: np.ndarray, receive: torch.Tensor, receive_R: np.ndarray
    ) -> None:
        parts = [sent.split(counts.tolist()) for sent, counts in self._show((send, send_R))]
        got = torch.cat([part[self.rank] for part in parts])
        assert [len(part[self.rank]) for part in parts] == receive_R.tolist()
        receive.copy_(got)
        self._barrier.wait(30)  # nobody reuses what it shows before all have read it


def _shape(ranks: int) -> Shape:
    arguments = ["--ranks", str(ranks), "--nodes", "1", "--experts", "12", "--topk", "3"]
    arguments += ["--groups", "1", "--topk-groups", "1", "--routing", "skewed", "--hidden", "72"]
    return parse([*arguments, "--tokens", "19"]).shapes[0]


def _drop_some(inputs: Inputs) -> Inputs:
    idx_TK = inputs.topk_idx_TK.clone()
    idx_TK[::3, 1] = -1
    idx_TK[5] = -1
    return replace(inputs, topk_idx_TK=idx_TK)


def _run(shape: Shape, inputs: Sequence[Inputs]) -> list[FlatCase]:
    shown, barrier = [None] * shape.ranks, threading.Barrier(shape.ranks)

    def one(rank: int) -> FlatCase:
        case = FlatCase(_Mailbox(rank, shown, barrier), shape, inputs[rank], Buffers())
        for _ in range(2):  # the second time in buffers that are there already
            case.dispatch()
            case.rows_MH.mul_(1 + rank / 4)
            case.combine()
        return case

    with ThreadPoolExecutor(shape.ranks) as pool:
        return list(pool.map(one, range(shape.ranks)))


@pytest.mark.parametrize("ranks", [1, 3])
def test_flat_equals_the_oracle_of_one_node(ranks: int) -> None:
    shape = _shape(ranks)
    inputs = [_drop_some(make_inputs(shape, rank)) for rank in range(ranks)]
    cases = _run(shape, inputs)
    given = [oracle.Input(i.x_TH, i.topk_idx_TK, i.topk_weights_TK) for i in inputs]
    world = oracle.World(node_of=[0] * ranks, num_experts=shape.experts)
    expected = oracle.dispatch(given, world)
    for case, want in zip(cases, expected, strict=True):
        assert case.meta_MC[:, 0].tolist() == want.source[:, 1].tolist()
        assert case.meta_MC[:, 1:4].tolist() == np.asarray(want.topk_idx).tolist()
        weights_MK = case.meta_MC[:, 4:].view(torch.float32)
        assert weights_MK.tolist() == np.asarray(want.topk_weights).tolist()
    outputs = [oracle.Outputs(case.rows_MH) for case in cases]
    sums = oracle.combine(outputs, expected, given, world, WireFormat.BF16)
    for case, (want_TH, _) in zip(cases, sums, strict=True):
        assert torch.equal(case.out_TH.view(torch.int16), want_TH.view(torch.int16))


def test_inputs_repeat_and_differ_between_ranks() -> None:
    shape = _shape(3)
    first, again, other = (make_inputs(shape, rank) for rank in (1, 1, 2))
    assert torch.equal(first.x_TH, again.x_TH)
    assert torch.equal(first.topk_idx_TK, again.topk_idx_TK)
    assert not torch.equal(first.x_TH, other.x_TH)
    assert not torch.equal(first.topk_idx_TK, other.topk_idx_TK)
