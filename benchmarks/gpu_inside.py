"""Dispatch and combine inside a node of GPUs (or ranks of one GPU): time against the copy floor.

    bash launch/gpu.sh -n 8 --sms 16 python -m benchmarks.gpu_inside --sms 16

The floor is the time in which the GPU would copy the call's bytes, every input byte read once and
every output byte written once, at the copy rate measured in the same run. Ranks that share a GPU
share its rate; on several GPUs the floor does not apply. A figure is the median over groups of
calls of the slowest rank's mean time per call, by CUDA events.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

import epcomm
from epcomm.formats import quantize_fp8
from epcomm.routing import make_routing


@dataclass
class Figure:
    """One line of the table; times in microseconds."""

    ranks: int
    sms: int
    tokens: int
    name: str
    call_us: float
    floor_us: float
    host_us: float

    @property
    def share(self) -> float:
        """Part of the copy rate reached, 0 to 1."""
        return self.floor_us / self.call_us

    def __str__(self) -> str:
        return (
            f"{self.ranks} x {self.sms:3d} SMs  {self.tokens:6d} tokens  {self.name:28s}"
            f"{self.call_us:9.1f} us  floor {self.floor_us:8.1f} us  {100 * self.share:5.1f} %"
            f"  host {self.host_us:6.1f} us"
        )


def copy_rate(comm: Any) -> float:
    """Bytes a second read and written by a device copy, measured on rank 0 alone."""
    rate = 0.0
    if comm.rank == 0:
        a = torch.ones(2**31, dtype=torch.uint8, device="cuda")
        b = torch.empty_like(a)
        times = []
        for _ in range(8):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            b.copy_(a)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
        rate = 2 * a.numel() / float(np.median(times[2:]))
        del a, b
        torch.cuda.empty_cache()
    return comm.bcast(rate)


def measure(comm: Any, call: Callable[[int], Any], groups: int, size: int) -> tuple[float, float]:
    """(microseconds a call, host microseconds a call), slowest rank."""
    times, hosts = [], []
    for group in range(groups + 1):
        torch.cuda.synchronize()
        comm.Barrier()
        call(0)  # fills the pipeline; not measured
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        start = time.perf_counter()
        for i in range(size):
            call(i)
        hosts.append((time.perf_counter() - start) / size * 1e6)
        end.record()
        torch.cuda.synchronize()
        if group:
            times.append(begin.elapsed_time(end) * 1e3 / size)
    mine = np.array([np.median(times), np.median(hosts)])
    slowest = comm.allreduce(mine, lambda a, b: np.maximum(a, b))
    return float(slowest[0]), float(slowest[1])


def run(comm: Any, options: argparse.Namespace, sms: int, rate: float) -> list[Figure]:
    """All figures for one number of SMs."""
    tokens, hidden, num_experts, num_topk = options.tokens, 7168, 256, 8
    buffer = epcomm.Buffer(
        comm,
        hidden=hidden,
        num_experts=num_experts,
        num_topk=num_topk,
        max_tokens=tokens,
        backend="cuda",
        num_sms=sms,
        timeout=20.0,
    )
    routing = make_routing(options.routing, tokens, num_experts, num_topk, seed=comm.rank)
    topk_idx = torch.as_tensor(routing.topk_idx_TK).cuda()
    weights = torch.as_tensor(routing.topk_weights_TK).cuda()
    # Two inputs in turn, together larger than the L2.
    rows = [torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    pairs = [quantize_fp8(x.cpu(), "f32") for x in rows]
    packed = [(q.cuda(), scales.cuda()) for q, scales in pairs]
    first = buffer.dispatch(rows[0], topk_idx, weights)
    handle = first.handle
    copies = comm.allreduce(first.num_rows)
    num_rows = first.num_rows
    del first
    all_tokens = comm.allreduce(tokens)
    bf16, fp8 = 2 * hidden, hidden + 4 * (hidden // 128)
    y = buffer.combine_input(handle)
    y.copy_(torch.randn(num_rows, hidden, device="cuda"))
    out = torch.empty_like(rows[0])
    figures = []

    def add(name: str, call: Callable[[int], Any], read: int, write: int) -> None:
        call_us, host_us = measure(comm, call, options.groups, options.group_size)
        floor = (all_tokens * read + copies * write) / rate * 1e6
        figures.append(Figure(comm.size, sms, tokens, name, call_us, floor, host_us))
        if comm.rank == 0:
            print(figures[-1], flush=True)

    add("dispatch BF16", lambda i: buffer.dispatch(rows[i % 2], handle=handle), bf16, bf16)
    add("dispatch FP8 pair", lambda i: buffer.dispatch(packed[i % 2], handle=handle), fp8, fp8)
    add(
        "dispatch BF16 to FP8",
        lambda i: buffer.dispatch(rows[i % 2], handle=handle, quantize="fp8"),
        bf16,
        fp8,
    )
    add("combine BF16", lambda i: buffer.combine(y, handle, out=out), bf16, bf16)
    add("first BF16", lambda i: buffer.dispatch(rows[i % 2], topk_idx, weights), bf16, bf16)
    add("first FP8 pair", lambda i: buffer.dispatch(packed[i % 2], topk_idx, weights), fp8, fp8)
    add(
        "first BF16 to FP8",
        lambda i: buffer.dispatch(rows[i % 2], topk_idx, weights, quantize="fp8"),
        bf16,
        fp8,
    )
    torch.cuda.synchronize()
    comm.Barrier()
    buffer.close()
    return figures


def main() -> None:
    """Parse options, measure, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sms", type=int, nargs="+", default=[16])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a rank")
    parser.add_argument("--routing", default="uniform")
    parser.add_argument("--groups", type=int, default=7)
    parser.add_argument("--group-size", type=int, default=6)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    rate = copy_rate(comm)
    if comm.rank == 0:
        print(f"copy rate {rate / 1e12:.3f} TB/s, read and written", flush=True)
    figures = [figure for sms in options.sms for figure in run(comm, options, sms, rate)]
    if options.json is not None and comm.rank == 0:
        record = {"copy_rate": rate, "figures": [asdict(f) for f in figures]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
