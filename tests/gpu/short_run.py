"""A few small calls of every kind, checked: what tools that slow kernels down are run over."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "mpi"), str(Path(__file__).parent)]

import torch  # noqa: E402
from harness import Case  # noqa: E402
from mpi4py import MPI  # noqa: E402
from on_gpu import check, make_buffer  # noqa: E402

BASE = Case(1, hidden=528, experts_per_rank=3, num_topk=3, tokens=(21, 6), num_bias=1)
CASES = [
    BASE,
    replace(BASE, quantize="fp8", layout="expert", alignment=4, row_weights=True),
    replace(BASE, packed="ue8m0", routing="sparse", tokens=(5, 0)),
    replace(BASE, dtype=torch.float32, fixed_rows=90),
    replace(BASE, dtype=torch.float32, quantize="fp8"),
]


def main() -> None:
    comm = MPI.COMM_WORLD
    case = replace(BASE, ranks_per_node=comm.size)
    with make_buffer(comm, case, num_sms=2, timeout=100.0) as buffer:
        for one in CASES:
            check(comm, replace(one, ranks_per_node=comm.size), buffer)
        comm.Barrier()
    if comm.rank == 0:
        sys.stdout.write(f"{len(CASES)} cases equal the oracle\n")


if __name__ == "__main__":
    main()
