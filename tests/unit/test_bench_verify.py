"""The benchmark's verification finds what is wrong."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.epcomm_case import EpcommCase
from benchmarks.options import Shape, parse
from benchmarks.verify import VerificationError, check_metadata, check_rows, sampled_tokens
from benchmarks.workload import Inputs, make_inputs, normal_rows


class _Alone:
    rank = 0

    def allgather(self, item: Any) -> list[Any]:
        return [item]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """Make a process group of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def _done(group: Any, layout: str) -> tuple[Shape, Inputs, EpcommCase]:
    arguments = ["--ranks", "1", "--nodes", "1", "--experts", "8", "--topk", "2", "--groups", "1"]
    arguments += ["--topk-groups", "1", "--routing", "gate", "--hidden", "144", "--tokens", "20"]
    shape = parse([*arguments, "--layout", layout]).shapes[0]
    inputs = make_inputs(shape, 0)
    case = EpcommCase(group, shape, inputs)
    case.dispatch()
    assert case.received is not None
    case.y_MH = normal_rows(shape, 0, case.received.num_rows, 2)
    case.combine(case.y_MH)
    return shape, inputs, case


def _check(shape: Shape, inputs: Inputs, case: EpcommCase) -> None:
    check_metadata(_Alone(), shape, inputs, case)
    check_rows(_Alone(), shape, inputs, case, sampled_tokens(shape.tokens))


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_right_results_pass(group: Any, layout: str) -> None:
    _check(*_done(group, layout))


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("part", ["x", "scales", "source", "topk_weights", "sums"])
def test_one_wrong_value_is_found(group: Any, layout: str, part: str) -> None:
    shape, inputs, case = _done(group, layout)
    if part == "sums":
        assert case.returned is not None
        case.returned.x[0, 7] += 0.125
    else:
        wrong = getattr(case.received, part)
        bits = wrong.view(torch.uint8).numpy().reshape(len(wrong), -1)
        bits[0, 0] ^= np.uint8(1)
    with pytest.raises(VerificationError, match="differ"):
        _check(shape, inputs, case)
