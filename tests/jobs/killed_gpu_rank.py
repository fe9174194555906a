"""A job of which one rank is killed in the middle of a kernel; prints what became of the others.

    bash launch/gpu.sh -n RANKS --sms 10 --once python3 tests/jobs/killed_gpu_rank.py ARGUMENTS

It starts its ranks itself: a launcher would end them all as soon as one is killed. ARGUMENTS are
RANKS NODES HOW; with several NODES there are emulated network cards between them. HOW:

    nobody    no rank is killed
    before    the last rank is killed before it calls, while the others' kernels wait for it
    waiting   the last rank is killed while its kernel waits for the others, who come later
    moving    the last rank is killed somewhere in its kernels, which delays make last long
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

TIMEOUT = 3.0  # of the buffer, seconds
PATIENCE = 60.0  # of this program
ROUNDS = 30
DELAY_NS = 20_000_000


@dataclass(frozen=True)
class Job:
    """What is run, and where its ranks find each other."""

    size: int
    nodes: int
    how: str
    folder: str

    @property
    def killed(self) -> int:
        """The rank that is, if one is."""
        return self.size - 1


@dataclass
class Answer:
    """How a rank ended.

    Attributes:
        kind: the exception's class, or "returned".
        ours: whether it is one of epcomm's.
        seconds: from the last rank's end to this answer, about.
        usable: the GPU still works for this process.
    """

    rank: int
    kind: str
    ours: bool
    message: str
    ranks: tuple[int, ...]
    seconds: float
    usable: bool


def kill_soon(seconds: float) -> None:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def gpu_works() -> bool:
    import torch

    try:
        return int(torch.arange(10, device="cuda").sum()) == 45
    except RuntimeError:
        return False


def run_rank(rank: int, job: Job, answers: Any, told: Any) -> None:
    size, how = job.size, job.how
    os.environ["CUDA_VISIBLE_DEVICES"] = str(rank // int(os.environ["EPCOMM_GPU_RANKS"]))
    if how == "moving":
        os.environ["EPCOMM_CUDA_DELAY_NS"] = str(DELAY_NS)
    import torch
    import torch.distributed as dist

    import epcomm

    dist.init_process_group(
        "gloo", init_method=f"file://{job.folder}/store", rank=rank, world_size=size
    )
    buffer = epcomm.Buffer(
        dist.group.WORLD,
        hidden=2048,
        num_experts=2 * size,
        num_topk=2,
        max_tokens=512,
        ranks_per_node=size // job.nodes,
        timeout=TIMEOUT,
        backend="cuda",
        num_sms=8,
        fabric="auto" if job.nodes == 1 else "emulated",
    )
    x = torch.ones(512, 2048, dtype=torch.bfloat16, device="cuda")
    topk_idx = torch.rand(512, 2 * size, device="cuda").topk(2, dim=1).indices

    def call() -> None:
        recv = buffer.dispatch(x, topk_idx)
        buffer.combine(recv.x, recv.handle)
        buffer.check()

    call()
    dist.barrier()
    if rank == job.killed:
        if how == "before":
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "waiting":
            kill_soon(0.3)
        if how == "moving":
            kill_soon(0.05)
    elif how == "waiting":
        time.sleep(1.0)
    started = time.monotonic()
    answer = Answer(rank, "returned", True, "", (), 0.0, False)
    try:
        for _ in range(ROUNDS):
            call()
    except BaseException as error:
        answer.kind, answer.message = type(error).__name__, str(error)
        answer.ours = isinstance(error, epcomm.EpcommError)
        answer.ranks = tuple(getattr(error, "ranks", ()))
    answer.seconds = time.monotonic() - started
    answer.usable = gpu_works()
    answers.put(answer)
    told.wait(PATIENCE)  # so that nobody's exit disturbs the others


def main() -> None:
    size, nodes, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    context = multiprocessing.get_context("spawn")
    answers, told = context.Queue(), context.Event()
    collected: list[Answer] = []
    with tempfile.TemporaryDirectory() as folder:
        job = Job(size, nodes, how, folder)
        processes = [
            context.Process(target=run_rank, args=(rank, job, answers, told))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + PATIENCE
        expected = size if how == "nobody" else size - 1
        while len(collected) < expected and time.monotonic() < deadline:
            if not answers.empty():
                collected.append(answers.get())
            time.sleep(0.05)
        told.set()
        for process in processes:
            process.join(max(1.0, deadline - time.monotonic()))
        stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
    report = {"answers": [asdict(a) for a in collected], "stuck": stuck}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
