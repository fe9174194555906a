"""Dispatch and combine of the CPU back end over a fabric, against the oracle, on forked ranks.

    python tests/fabric/dispatch_combine.py RANKS RANKS_PER_NODE FABRIC

Prints one line per case and ends with status 0 if all agree. The ranks are forked, so that torch
is imported and the kernels are loaded once; they find each other through gloo, which carries
nothing but the making of the buffers.
"""

import fcntl
import os
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from numba.core.dispatcher import Dispatcher

import epcomm

sys.path.insert(0, str(Path(__file__).parents[1] / "mpi"))
from harness import Case, check
from ranks import end_with_parent

#: Long, as processors may be emulated and one for many ranks.
TIMEOUT = 120.0
CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8 to experts": {"quantize": "fp8", "layout": "expert", "alignment": 8, "hidden": 256},
    "packed, some ranks empty": {"packed": "ue8m0", "hidden": 256, "tokens": (0, 33, 1)},
}


def compile_in_turn(path: str) -> None:
    """Let one process compile at a time; the next then finds the result in Numba's cache.

    Processes that compile a kernel at the same time do the work many times, and their files in the
    cache may not fit each other.
    """
    file = os.open(path, os.O_CREAT | os.O_RDWR)
    compile_now, depth = Dispatcher.compile, 0

    def compile_alone(self: Any, signature: Any) -> Any:
        nonlocal depth
        if depth == 0:
            fcntl.flock(file, fcntl.LOCK_EX)
        depth += 1  # compiling a kernel compiles those that it calls
        try:
            return compile_now(self, signature)
        finally:
            depth -= 1
            if depth == 0:
                fcntl.flock(file, fcntl.LOCK_UN)

    Dispatcher.compile = compile_alone


def say(text: str) -> None:
    """One write, so that lines of ranks stay whole."""
    os.write(1, f"{text}\n".encode())


def run_rank(rank: int, size: int, shape: int, fabric: str, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store of {size}", size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    try:
        run_cases(rank, size, shape, fabric)
    finally:
        dist.destroy_process_group()


def run_cases(rank: int, size: int, shape: int, fabric: str) -> None:
    comm = SimpleNamespace(rank=rank, size=size)
    for name, details in CASES.items():
        case = Case(shape, **details)
        started = time.monotonic()
        with epcomm.Buffer(
            dist.group.WORLD,
            hidden=case.hidden,
            num_experts=case.num_experts(size),
            num_topk=case.num_topk,
            max_tokens=max(case.tokens),
            ranks_per_node=shape,
            timeout=TIMEOUT,
            num_threads=1,
            fabric=fabric,
        ) as buffer:
            check(comm, case, buffer)
        dist.barrier()
        if rank == 0 and size > 1:
            say(f"{name}: as the oracle, {time.monotonic() - started:.1f} s")


def main() -> int:
    started = time.monotonic()
    size, shape, fabric = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    children = []
    torch.set_num_threads(1)  # and no thread that a fork would lose
    with tempfile.TemporaryDirectory() as folder:
        # The forks inherit what is loaded: once instead of in every rank.
        run_rank(0, 1, 1, "auto", folder)
        say(f"kernels of one node loaded: {time.monotonic() - started:.1f} s")
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                status = 1
                end_with_parent()
                try:
                    # A lock of a file that the parent opened would be the forks' common one.
                    compile_in_turn(f"{folder}/compiling")
                    run_rank(rank, size, shape, fabric, folder)
                    status = 0
                except BaseException:
                    say(f"----- rank {rank}\n{traceback.format_exc()}")
                os._exit(status)
            children.append(pid)
        statuses = [os.waitpid(pid, 0)[1] for pid in children]
    say(f"{size} ranks on {size // shape} nodes: {time.monotonic() - started:.1f} s")
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
