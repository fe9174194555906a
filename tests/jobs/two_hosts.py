"""A rank on one of two hosts: dispatch and combine over MPI and gloo, compared with the oracle.

``two_hosts.py FOLDER``. Rank 0 writes what it saw of the link to FOLDER/link.json.
"""

import json
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "mpi"))

import torch.distributed as dist
from harness import Case, check, nodes_of
from mpi4py import MPI

import epcomm

CASES = {
    "bf16": Case(1),
    "packed while sent, wide rows": Case(1, hidden=2048, tokens=(96,), quantize="fp8"),
    "layout expert, short wire": Case(
        1, hidden=136, layout="expert", alignment=4, wire="logfmt10", tokens=(31, 7)
    ),
    "no token on some ranks": Case(1, tokens=(0, 9, 0, 1), num_bias=1),
    "all to one rank": Case(1, routing="one rank", tokens=(64,), row_weights=True),
}


class Group:
    """A gloo group with the two attributes the harness asks a communicator for."""

    def __init__(self, comm: MPI.Intracomm, folder: Path) -> None:
        self.rank, self.size = comm.rank, comm.size
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=comm.rank, world_size=comm.size
        )


def check_found_hosts(group: Any, ranks: Any, case: Case) -> None:
    """Run a case on nodes that the Buffer finds by itself."""
    with epcomm.Buffer(
        group,
        hidden=case.hidden,
        num_experts=case.num_experts(ranks.size),
        num_topk=case.num_topk,
        max_tokens=max(case.tokens),
    ) as buffer:
        per_host = ranks.size // 2
        assert buffer.topology.node_of == (0,) * per_host + (1,) * per_host
        check(ranks, replace(case, ranks_per_node=per_host), buffer)


def retransmitted() -> int:
    """TCP segments that this host has sent again."""
    names, values = [
        line.split()
        for line in Path("/proc/net/snmp").read_text().splitlines()
        if line.startswith("Tcp:")
    ]
    return int(values[names.index("RetransSegs")])


def round_trip(comm: MPI.Intracomm) -> float:
    """Shortest time in seconds for an empty message to the other host and back."""
    times = []
    for _ in range(20):
        started = time.perf_counter()
        if comm.rank == 0:
            comm.send(None, comm.size - 1)
            comm.recv(source=comm.size - 1)
        elif comm.rank == comm.size - 1:
            comm.send(comm.recv(source=0), 0)
        times.append(time.perf_counter() - started)
    return min(times)


def main(folder: Path) -> None:
    comm = MPI.COMM_WORLD
    per_host = comm.size // 2
    names = comm.allgather(socket.gethostname())
    assert len({*names[:per_host]}) == len({*names[per_host:]}) == len({*names}) - 1 == 1
    shortest = round_trip(comm)
    for case in CASES.values():
        for shape in nodes_of(per_host):
            check(comm, replace(case, ranks_per_node=shape))
    check_found_hosts(comm, comm, CASES["bf16"])
    group = Group(comm, folder)
    for case in CASES.values():
        check_found_hosts(dist.group.WORLD, group, case)
    dist.destroy_process_group()
    again = comm.gather(retransmitted())
    if again is not None:
        report = {"round_trip": shortest, "retransmitted": again[0] + again[-1]}
        (folder / "link.json").write_text(json.dumps(report))


main(Path(sys.argv[1]))
