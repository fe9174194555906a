"""A few small calls of every kind, checked: what tools that slow kernels down are run over."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "mpi"), str(Path(__file__).parent)]

import torch  # noqa: E402
from harness import Case  # noqa: E402
from mpi4py import MPI  # noqa: E402
from on_gpu import bound_for, check, make_buffer  # noqa: E402

BASE = Case(1, hidden=528, experts_per_rank=3, num_topk=3, tokens=(21, 6), num_bias=1)
CASES = [
    BASE,
    replace(BASE, quantize="fp8", layout="expert", alignment=4, row_weights=True),
    replace(BASE, packed="ue8m0", routing="sparse", tokens=(5, 0)),
    replace(BASE, dtype=torch.float32, quantize="fp8"),
]
#: In a buffer of its own: under compute-sanitizer torch does not let go of tensors made over a
#: window, and such calls cannot wait for another one.
FIXED = replace(BASE, dtype=torch.float32, fixed_rows=90)


#: Every kind of kernel between nodes.
FABRICS = ["proxy/local", "emulated", "emulated planes=2 failover=1"]


def run(comm: MPI.Comm, cases: list[Case], ranks_per_node: int, **options: object) -> None:
    case = replace(BASE, ranks_per_node=ranks_per_node)
    with make_buffer(comm, case, num_sms=2, timeout=100.0, **options) as buffer:
        for one in cases:
            check(comm, replace(one, ranks_per_node=ranks_per_node), buffer)
        comm.Barrier()
    if comm.rank == 0:
        sys.stdout.write(f"{len(cases)} cases equal the oracle {options or ''}\n")
        sys.stdout.flush()


def main() -> None:
    """Within a node; with the argument "nodes", every rank as a node of its own."""
    comm = MPI.COMM_WORLD
    if sys.argv[1:] != ["nodes"]:
        run(comm, CASES, comm.size)
        run(comm, [FIXED], comm.size)
        return
    cases = [CASES[0], CASES[1], replace(BASE, wire="logfmt10"), CASES[3]]
    for fabric in FABRICS:
        run(comm, cases, 1, fabric=fabric)
    run(comm, cases[:1], 1, fabric="emulated", max_staging_bytes=bound_for(BASE, comm.size, 9))


if __name__ == "__main__":
    main()
