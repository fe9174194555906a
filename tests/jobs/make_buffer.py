"""Makes a CUDA buffer on the first GPU; prints, on rank 0, what came of it."""

import sys

from mpi4py import MPI

import epcomm

outcome = "made"
try:
    epcomm.Buffer(
        MPI.COMM_WORLD,
        hidden=64,
        num_experts=2 * MPI.COMM_WORLD.size,
        num_topk=1,
        max_tokens=1,
        backend="cuda",
    ).close()
except (RuntimeError, ValueError) as error:
    outcome = f"{type(error).__name__}: {error}"
outcomes = MPI.COMM_WORLD.gather(outcome)
if outcomes is not None:
    sys.stdout.write("\n".join(outcomes) + "\n")
