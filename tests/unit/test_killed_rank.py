"""A rank killed in the middle of a call, without a launcher that ends the others."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

TIMEOUT = 60.0
#: A rank on the same node is watched; its death must be noticed long before the deadline.
SOON = 15.0


def kill_in(step: str) -> None:
    """Replace a step of dispatch by the process's sudden end."""
    from epcomm.cpu.dispatch import Dispatch

    setattr(Dispatch, step, lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def run_rank(
    rank: int, size: int, shape: int, step: str, fabric: str, folder: str, results: Any, told: Any
) -> None:
    import torch
    import torch.distributed as dist

    import epcomm

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    buffer = epcomm.Buffer(
        dist.group.WORLD,
        hidden=64,
        num_experts=2 * size,
        num_topk=2 * size,
        max_tokens=8,
        ranks_per_node=shape,
        timeout=TIMEOUT,
        num_threads=1,
        fabric=fabric,
    )
    x = torch.ones(8, 64, dtype=torch.bfloat16)
    topk_idx = torch.arange(2 * size).repeat(8, 1)
    recv = buffer.dispatch(x, topk_idx)
    assert torch.equal(buffer.combine(recv.x, recv.handle).x, x * size)
    if rank == size - 1:
        kill_in(step)
    started = time.monotonic()
    try:
        buffer.dispatch(x, topk_idx)
        # Ranks of another node may have got all their rows before; they meet it in the next call.
        buffer.dispatch(x, topk_idx)
        outcome: tuple[str, Any] = ("returned", ())
    except epcomm.PeerTimeoutError as error:
        outcome = (str(error), error.ranks)
    except BaseException as error:
        outcome = (f"{type(error).__name__}: {error}", ())
    elapsed = time.monotonic() - started
    try:
        buffer.dispatch(x, topk_idx)
        closed = False
    except epcomm.BufferClosedError:
        closed = True
    results.put((rank, elapsed, outcome, closed))
    # A rank that ends closes its connections, and might be taken for the culprit.
    told.wait(TIMEOUT)


@pytest.mark.parametrize(
    ("size", "shape", "step", "fabric"),
    [
        (3, 3, "_announce", "auto"),
        (3, 3, "_arrive", "auto"),
        (4, 2, "_move", "auto"),
        (4, 2, "_move", "proxy/local"),
        (3, 1, "_announce", "proxy/local"),
        (3, 1, "_arrive", "proxy/local"),
    ],
)
def test_survivors_name_the_killed_rank(tmp_path, size, shape, step, fabric):
    """Soon, with the buffer unusable, no memory left behind, and no process that stays."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["epcomm"])
    results, told = context.Queue(), context.Event()
    processes = [
        context.Process(
            target=run_rank, args=(rank, size, shape, step, fabric, str(tmp_path), results, told)
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        answers = sorted(results.get(timeout=TIMEOUT) for _ in range(size - 1))
        for rank, elapsed, (message, ranks), closed in answers:
            assert rank != size - 1
            assert ranks == (size - 1,), message
            assert elapsed < SOON, message
            assert closed
        told.set()
        for process in processes:
            process.join(SOON)
            assert not process.is_alive()
        assert [p.exitcode for p in processes] == [0] * (size - 1) + [-signal.SIGKILL]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    assert not list(Path("/dev/shm").glob("*epcomm*"))
