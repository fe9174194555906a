"""What the tests of refused calls share: expectations about every rank, and a small case."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Case, draw_inputs

import epcomm

#: Far below the buffers' timeout of 30 s: nobody may have waited for a deadline.
SOON = 10.0
CASE = Case(1, hidden=48, experts_per_rank=2, num_topk=2, tokens=(3, 0, 5))


def expect(
    comm: Any, bad_rank: int, call: Callable[[], Any], kind: type[Exception], words: tuple[str, ...]
) -> None:
    """``call`` fails with ``kind`` on the bad rank and with a PeerError naming it elsewhere."""
    started = time.monotonic()
    with pytest.raises(kind if comm.rank == bad_rank else epcomm.PeerError) as caught:
        call()
    assert time.monotonic() - started < SOON
    message = str(caught.value)
    for word in words:
        assert word in message
    if comm.rank != bad_rank:
        assert caught.type is epcomm.PeerError
        assert caught.value.ranks == (bad_rank,)
        assert f"rank {bad_rank}:" in message


def expect_mismatch(comm: Any, odd: int, call: Callable[[], Any], *words: str) -> None:
    started = time.monotonic()
    with pytest.raises(epcomm.MismatchError) as caught:
        call()
    assert time.monotonic() - started < SOON
    message = str(caught.value)
    assert "disagree" in message
    assert f"rank {odd} " in message
    for word in words:
        assert word in message
    if odd != 0:
        assert caught.value.ranks == (odd,)


def arguments(case: Case, comm: Any) -> dict[str, Any]:
    given = draw_inputs(case, comm.size)[comm.rank]
    return {"x": given.x, "topk_idx": given.topk_idx, "topk_weights": given.topk_weights}


def rows(count: int, hidden: int = CASE.hidden, dtype: torch.dtype = torch.bfloat16) -> Any:
    return torch.zeros(count, hidden, dtype=dtype)
