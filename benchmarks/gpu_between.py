"""Dispatch and combine between virtual nodes on one machine's GPUs: time, bytes, triggers.

    bash launch/gpu.sh -n 8 --sms 16 python -m benchmarks.gpu_between --ranks-per-node 4

The floor is the time in which the GPU would copy the call's bytes at the copy rate of the same
run: every input row read once, every record written into staging and read from it once on each
side (the fabric's copy reads one and writes the other), every output row written once. With routing
"gate" a token goes to at most four nodes.
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

from .gpu.timing import copy_rate


@dataclass
class Figure:
    """One line of the table; per call, times in microseconds, bytes and triggers per rank."""

    nodes: int
    ranks_per_node: int
    sms: int
    tokens: int
    name: str
    call_us: float
    floor_us: float
    host_us: float
    scale_up_bytes: float
    scale_out_bytes: float
    triggers: float
    proxy_us: float

    @property
    def share(self) -> float:
        """Part of the copy rate reached, 0 to 1."""
        return self.floor_us / self.call_us

    def __str__(self) -> str:
        return (
            f"{self.nodes} x {self.ranks_per_node} x {self.sms:3d} SMs  {self.name:22s}"
            f"{self.call_us:9.1f} us  floor {self.floor_us:8.1f} us  {100 * self.share:5.1f} %"
            f"  up {self.scale_up_bytes / 1e6:7.1f} MB  out {self.scale_out_bytes / 1e6:7.1f} MB"
            f"  {self.triggers:6.1f} triggers  proxy {self.proxy_us:7.1f} us"
            f"  host {self.host_us:6.1f} us"
        )


def measure(comm: Any, call: Callable[[int], Any], groups: int, size: int) -> tuple[float, float]:
    """(microseconds a call, host microseconds a call): medians over groups, slowest rank."""
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
    slowest = comm.allgather((float(np.median(times)), float(np.median(hosts))))
    return max(t for t, _ in slowest), max(h for _, h in slowest)


class Proxy:
    """What this rank's proxy threads have done since the last look."""

    def __init__(self, buffer: epcomm.Buffer) -> None:
        self._scale_out: Any = buffer._backend._scale_out  # type: ignore[union-attr]

    def look(self) -> np.ndarray:
        """Triggers taken and nanoseconds of processor time, so far."""
        threads = self._scale_out.fabric.threads
        return np.array([threads["triggers"].sum(), threads["busy_ns"].sum()], np.float64)


def run(comm: Any, options: argparse.Namespace, sms: int, rate: float) -> list[Figure]:
    """All figures for one number of SMs."""
    tokens, hidden, num_experts, num_topk = options.tokens, 7168, 256, 8
    nodes = comm.size // options.ranks_per_node
    buffer = epcomm.Buffer(
        comm,
        hidden=hidden,
        num_experts=num_experts,
        num_topk=num_topk,
        max_tokens=tokens,
        ranks_per_node=options.ranks_per_node,
        backend="cuda",
        fabric="proxy/local",
        num_sms=sms,
        timeout=20.0,
    )
    # The gate's groups are the nodes' experts; a token goes to at most four nodes.
    groups = (
        {"num_groups": nodes, "topk_groups": min(4, nodes)} if options.routing == "gate" else {}
    )
    routing = make_routing(options.routing, tokens, num_experts, num_topk, seed=comm.rank, **groups)
    topk_idx = torch.as_tensor(routing.topk_idx_TK).cuda()
    weights = torch.as_tensor(routing.topk_weights_TK).cuda()
    # Two inputs in turn, together larger than the L2.
    rows = [torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    pairs = [quantize_fp8(x.cpu(), "f32") for x in rows]
    packed = [(q.cuda(), scales.cuda()) for q, scales in pairs]
    first = buffer.dispatch(rows[0], topk_idx, weights)
    handle, num_rows = first.handle, first.num_rows
    del first
    y = buffer.combine_input(handle)
    y.copy_(torch.randn(num_rows, hidden, device="cuda"))
    out = torch.empty_like(rows[0])
    proxy = Proxy(buffer)
    figures = []
    bf16, fp8 = 2 * hidden, hidden + 4 * (hidden // 128)

    all_tokens, copies = comm.allreduce(tokens), comm.allreduce(num_rows)

    def add(name: str, call: Callable[[int], Any], row_bytes: int, record: int) -> None:
        """``row_bytes``: read and written by rows of the call, over all ranks."""
        calls = 0

        def counted(i: int) -> Any:
            nonlocal calls
            calls += 1
            return call(i)

        before = proxy.look()
        call_us, host_us = measure(comm, counted, options.groups, options.group_size)
        spent = (proxy.look() - before) / calls
        traffic = call(0).traffic
        records = comm.allreduce(traffic.records)
        floor = (row_bytes + 4 * records * record) / rate * 1e6
        links = [traffic.scale_up.total_bytes, traffic.scale_out.total_bytes]
        mean = comm.allreduce(np.array([*links, *spent])) / comm.size
        where = (nodes, options.ranks_per_node, sms, tokens, name)
        up, out_bytes, triggers, busy_ns = mean.tolist()
        figures.append(
            Figure(*where, call_us, floor, host_us, up, out_bytes, triggers, busy_ns / 1e3)
        )
        if comm.rank == 0:
            print(figures[-1], flush=True)

    bf16_rows, fp8_rows = all_tokens * bf16 + copies * bf16, all_tokens * fp8 + copies * fp8
    add("dispatch BF16", lambda i: buffer.dispatch(rows[i % 2], handle=handle), bf16_rows, bf16)
    add("dispatch FP8 pair", lambda i: buffer.dispatch(packed[i % 2], handle=handle), fp8_rows, fp8)
    add(
        "dispatch BF16 to FP8",
        lambda i: buffer.dispatch(rows[i % 2], handle=handle, quantize="fp8"),
        all_tokens * bf16 + copies * fp8,
        fp8,
    )
    add("combine BF16", lambda i: buffer.combine(y, handle, out=out), bf16_rows, bf16)
    add(
        "first FP8 pair",
        lambda i: buffer.dispatch(packed[i % 2], topk_idx, weights),
        fp8_rows,
        fp8,
    )
    torch.cuda.synchronize()
    comm.Barrier()
    buffer.close()
    return figures


def main() -> None:
    """Parse options, measure, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks-per-node", type=int, default=4)
    parser.add_argument("--sms", type=int, nargs="+", default=[16])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a rank")
    parser.add_argument("--routing", default="gate")
    parser.add_argument("--groups", type=int, default=5)
    parser.add_argument("--group-size", type=int, default=6)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    # One rank measures: the ranks share the GPU, or have equal ones.
    rate = comm.bcast(copy_rate() if comm.rank == 0 else None)
    if comm.rank == 0:
        print(f"copy rate {rate / 1e12:.3f} TB/s, read and written", flush=True)
    figures = [figure for sms in options.sms for figure in run(comm, options, sms, rate)]
    if options.json is not None and comm.rank == 0:
        record = {"copy_rate": rate, "figures": [asdict(f) for f in figures]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
