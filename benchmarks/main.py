"""The benchmark, on every rank: ``bash launch/bench.sh``, or under mpirun by hand."""

import json
import sys
from pathlib import Path

from mpi4py import MPI
from tqdm import tqdm

from .exchanges import GlooWorld
from .measure import wait_for_all
from .options import Options, parse
from .report import (
    environment,
    print_definitions,
    print_environment,
    print_result,
    print_sweep,
)
from .run_shape import Result, run_shape


def _measure(options: Options) -> list[Result]:
    """Every shape in turn, on as many of the ranks as it wants; collective."""
    world = MPI.COMM_WORLD
    gloo = GlooWorld()
    results = []
    shapes = list(zip(options.shapes, options.labels, strict=True))
    for shape, label in tqdm(shapes, disable=world.rank > 0, file=sys.stderr, unit="shape"):
        group = gloo.group(shape.ranks)
        comm = world.Split(0 if world.rank < shape.ranks else MPI.UNDEFINED, world.rank)
        if comm != MPI.COMM_NULL:
            results.append(run_shape(comm, group, shape, label, options.repeats))
            comm.Free()
        wait_for_all(world)
    gloo.close()
    return results


def _report(options: Options, results: list[Result]) -> None:
    facts = environment()
    print_environment(facts)
    for result in results:
        print_result(result)
    if options.sweep:
        print_sweep(results)
    print_definitions(results[-1], options.repeats)
    if options.json:
        numbers = {"environment": facts, "results": [result.as_dict() for result in results]}
        Path(options.json).write_text(json.dumps(numbers, indent=1) + "\n")
    if options.plot:
        from .plot import plot

        plot(results, options.plot, f"{facts['mpi']}, {facts['cores']} cores, {facts['cpu']}")


def main() -> None:
    """Measure on all ranks, report on rank 0."""
    options = parse()
    world = MPI.COMM_WORLD
    if world.size != options.ranks:
        raise SystemExit(f"--ranks {options.ranks} needs as many ranks; mpirun made {world.size}")
    results = _measure(options)
    if world.rank == 0:
        _report(options, results)


if __name__ == "__main__":
    main()
