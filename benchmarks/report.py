"""The tables."""

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from mpi4py import MPI

import epcomm

from .measure import Timing
from .options import Shape
from .run_shape import STEPS, Result

_WIDTH = 100


def environment() -> dict[str, Any]:
    """Find out what belongs to every number: the machine and the versions."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model,
        "mpi": "{} {}".format(MPI.get_vendor()[0], ".".join(map(str, MPI.get_vendor()[1]))),
        "waiting": os.environ.get("MPIR_CVAR_ENABLE_HEAVY_YIELD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "numba": numba.__version__,
        "epcomm": epcomm.__version__,
    }


def print_environment(facts: dict[str, Any]) -> None:
    """One paragraph."""
    print(
        f"epcomm {facts['epcomm']} on {facts['cores']} cores ({facts['cpu']}); {facts['mpi']}, "
        f"Python {facts['python']}, torch {facts['torch']}, NumPy {facts['numpy']}, "
        f"Numba {facts['numba']}"
    )


def _describe(shape: Shape) -> str:
    return (
        f"{shape.ranks} ranks on {shape.nodes} nodes, {shape.tokens} tokens a rank, "
        f"hidden {shape.hidden}, top-{shape.topk} of {shape.experts} experts "
        f"({shape.topk_groups} of {shape.groups} groups)\n"
        f"routing {shape.routing}, seed {shape.seed}; dispatch {shape.dispatch_format}, combine "
        f"{shape.combine_format}, layout {shape.layout}"
    )


def _line(cells: Iterable[str]) -> None:
    first, *others = cells
    print("  " + f"{first:<32}" + "".join(f"{cell:>12}" for cell in others))


def print_times(result: Result, step: str) -> None:
    """How long every way of doing a step took, beside the floor."""
    _line([step, "median ms", "min ms", "max ms", "GB/s", "x epcomm", "% of floor"])
    best = result.timing("epcomm", step).seconds
    floor = result.floor_seconds(step)
    for name, timing in result.alternatives(step).items():
        _line(
            [
                name,
                f"{timing.seconds * 1e3:.2f}",
                f"{timing.seconds_N.min() * 1e3:.2f}",
                f"{timing.seconds_N.max() * 1e3:.2f}",
                f"{result.gigabytes_per_second(timing):.2f}",
                f"{timing.seconds / best:.2f}",
                f"{floor / timing.seconds:.0%}",
            ]
        )
    _line(["floor: read and write once", f"{floor * 1e3:.2f}"])
    for name, timing in result.alternatives(step).items():
        _print_phases(name, timing)
    print()


def _print_phases(name: str, timing: Timing) -> None:
    total = sum(timing.phases.values())
    shares = ", ".join(f"{n} {s / total:.0%}" for n, s in timing.phases.items() if s >= total / 200)
    ranks = timing.seconds_R
    print(f"    {name}: {shares}")
    print(
        f"      fastest rank {ranks.argmin()} {ranks.min() * 1e3:.2f} ms, "
        f"slowest rank {ranks.argmax()} {ranks.max() * 1e3:.2f} ms"
    )


def print_traffic(result: Result) -> None:
    """Bytes each rank moved over each kind of link, and what other schemes would have moved."""
    _line(["MB moved by a rank", "scale-up", "", "scale-out", "", "metadata"])
    _line(["", "mean", "busiest", "mean", "busiest", "mean"])
    for step in STEPS:
        traffic_R = result.traffic_R[step]
        up = np.array([t.scale_up.payload_bytes for t in traffic_R]) / 1e6
        out = np.array([t.scale_out.payload_bytes for t in traffic_R]) / 1e6
        extra = [t.scale_up.metadata_bytes + t.scale_out.metadata_bytes for t in traffic_R]
        numbers = [up.mean(), up.max(), out.mean(), out.max(), np.mean(extra) / 1e6]
        _line([f"{step}: epcomm", *(f"{n:.2f}" for n in numbers)])
        for name in traffic_R[0].alternatives:
            links = [t.alternatives[name] for t in traffic_R]
            up = np.array([link.scale_up for link in links]) / 1e6
            out = np.array([link.scale_out for link in links]) / 1e6
            numbers = [up.mean(), up.max(), out.mean(), out.max()]
            _line([f"  instead, {name}", *(f"{n:.2f}" for n in numbers)])
    print()


def print_result(result: Result) -> None:
    """Everything about one shape."""
    print("=" * _WIDTH)
    print(_describe(result.shape))
    busiest = max(result.rows_R) * len(result.rows_R) / max(result.rows, 1)
    print(
        f"a token goes to {result.ranks_per_token:.2f} ranks on {result.nodes_per_token:.2f} nodes;"
        f" the busiest rank receives {busiest:.2f} times the mean; results verified"
    )
    print()
    for step in STEPS:
        print_times(result, step)
    print_traffic(result)


def print_definitions(result: Result, repeats: int) -> None:
    """Say what the columns mean."""
    print(
        f"Times: median, fastest and slowest of {repeats} repeats, each the time of its slowest "
        f"rank; the cases take turns.\n"
        f"GB/s: (token, rank) rows counted once, as BF16, over the time: the same bytes for every "
        f"row of the table.\n"
        f"Floor: the input read once and the output written once at the rate of all ranks copying "
        f"at once,\n  {result.copy_rate / 1e9:.1f} GB/s read plus written. Data that fit in the "
        f"caches can be faster than this.\n"
        f"Flat: BF16 rows, one per (token, rank), packed with index_select, metadata in one "
        f"message, rows returned\n  and summed in FP32 by a compiled kernel; buffers are kept. "
        f"'in place': the experts' outputs lie in memory\n  epcomm lent; otherwise combine copies "
        f"them there first."
    )


def print_sweep(results: list[Result]) -> None:
    """One line per shape of a sweep."""
    print("=" * _WIDTH)
    for step in STEPS:
        names = list(results[0].alternatives(step))
        short = [
            name.replace("epcomm in", "in").replace("flat ", "").split("_")[0] for name in names
        ]
        _line([f"{step}, median ms", *(s.split(" all")[0] for s in short), "% of floor"])
        for result in results:
            seconds = [timing.seconds for timing in result.alternatives(step).values()]
            share = result.floor_seconds(step) / seconds[0]
            _line([result.label, *(f"{s * 1e3:.2f}" for s in seconds), f"{share:.0%}"])
        print()
