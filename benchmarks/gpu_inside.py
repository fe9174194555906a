"""Dispatch and combine inside a node of GPUs (or ranks of one GPU): time against the copy floor.

    bash launch/bench.sh                      # on a machine with a GPU: 8x16, 8x4 and 4x24
    bash launch/bench.sh --cases all --json results.json

Everything is checked against the oracle before it is timed. The cases are

- table: every call in a row of its like, and dispatches as their caller sees them, at each setting;
- sizes: 1, 8, 128 and 1024 tokens a rank; sms: 2 to 32 SMs a rank, as far as they fit;
- skew: the measured load profile of experts beside uniform routing;
- host: host time of small calls; gemm: beside matrix products; graph: replays of a CUDA graph.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from .gpu import cases
from .gpu.check import check, check_small
from .gpu.exchange import Exchange
from .gpu.figures import Machine, Table
from .gpu.gemm import beside_gemm
from .gpu.graph import replay
from .gpu.lockstep import Lockstep
from .gpu.options import SKEWED, SMALL_SIZES, Gpus, Options, Setting, parse
from .gpu.timing import Effort, copy_rate
from .measure import wait_for_all
from .options import Shape
from .report import environment, print_environment

#: Seconds a rank may stay silent in the case "graph": a capture that cannot work ends sooner.
_GRAPH_TIMEOUT = 5.0

Measure = Callable[[Exchange, Table, Effort], None]


def _find_gpus(world: Any) -> Gpus:
    """The GPUs the ranks use; collective."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = world.allgather((str(properties.uuid), properties.multi_processor_count))
    return Gpus(len({uuid for uuid, _ in found}), min(sms for _, sms in found))


def _copy_rate(world: Any) -> float:
    """Of rank 0's GPU, while the other ranks leave it alone; collective."""
    rate = copy_rate() if world.rank == 0 else 0.0
    wait_for_all(world)
    return world.bcast(rate)


class _Run:
    """The cases, in turn, each on as many of the ranks as it wants. Collective over ``world``."""

    def __init__(self, world: Any, options: Options, gpus: Gpus, out: Table) -> None:
        self.world = world
        self.options = options
        self.gpus = gpus
        self.out = out
        self.effort = Effort(options.groups, options.calls)
        self.failed = 0  # exchanges that could not be measured
        self._checked: set[Setting] = set()
        self._comms: dict[int, Any] = {}
        for ranks in dict.fromkeys(setting.ranks for setting in options.settings):
            color = 0 if world.rank < ranks else MPI.UNDEFINED
            self._comms[ranks] = world.Split(color, world.rank)
        self._locksteps = {
            ranks: Lockstep(comm) for ranks, comm in self._comms.items() if comm != MPI.COMM_NULL
        }

    def on(
        self, setting: Setting, name: str, measure: Measure, timeout: float = 20.0, **changes: Any
    ) -> None:
        """Make and check an exchange and measure on it; ``changes`` to the shape."""
        lockstep = self._locksteps.get(setting.ranks)
        if lockstep is not None:
            shape = replace(self.options.shape, ranks=setting.ranks, **changes)
            action = partial(self._exchange, setting, shape, measure, timeout)
            done = lockstep.attempt(f"{name} {setting} {shape.tokens} tokens", action)
            self.failed += not done
        wait_for_all(self.world)

    def _exchange(self, setting: Setting, shape: Shape, measure: Measure, timeout: float) -> None:
        comm = self._comms[setting.ranks]
        if setting not in self._checked:
            check_small(comm, shape, setting.sms)
            self._checked.add(setting)
        with Exchange(comm, shape, setting.sms, timeout) as exchange:
            check(exchange)
            measure(exchange, self.out, self.effort)

    def case(self, case: str) -> None:
        """One of the cases."""
        settings, tokens = self.options.settings, self.options.shape.tokens
        if case == "table":
            for setting in settings:
                self.on(setting, case, cases.table)
        elif case == "sizes":
            for size in (*SMALL_SIZES, tokens):
                self.on(settings[0], case, partial(cases.every_call, case), tokens=size)
        elif case == "sms":
            for setting in self.options.swept(self.gpus):
                self.on(setting, case, cases.sweep_sms)
        elif case == "skew":
            for routing in dict.fromkeys(("uniform", SKEWED)):
                self.on(settings[0], case, partial(cases.every_call, case), routing=routing)
        elif case == "host":
            self.on(settings[0], case, cases.host, tokens=min(64, tokens))
        elif case == "gemm":
            for setting in settings:
                self.on(setting, case, beside_gemm)
        else:
            assert case == "graph"
            for cached in (True, False):
                self.on(settings[0], case, partial(_graph, cached=cached), _GRAPH_TIMEOUT)


def _graph(exchange: Exchange, out: Table, effort: Effort, *, cached: bool) -> None:
    out.title("graph", exchange)
    replay(exchange, out, effort, cached=cached)


def main() -> None:
    """Measure on all ranks, report on rank 0."""
    world = MPI.COMM_WORLD
    gpus = _find_gpus(world)
    options = parse(gpus=gpus)
    if world.size < options.ranks:
        raise SystemExit(f"{options.ranks} ranks are needed; mpirun made {world.size}")
    facts = environment() | {"gpu": torch.cuda.get_device_name(), "gpus": gpus.count}
    out = Table(Machine(_copy_rate(world), gpus.count), world.rank == 0)
    if world.rank == 0:
        print_environment(facts)
    out.say(
        f"{facts['gpus']} x {facts['gpu']}, {gpus.sms} SMs; copy rate "
        f"{out.machine.copy_rate / 1e12:.3f} TB/s, read plus written"
    )
    run = _Run(world, options, gpus, out)
    for case in options.cases:
        run.case(case)
    out.definitions()
    for case in dict.fromkeys(figure.case for figure in out.figures):
        out.markdown(case)
    if options.json and world.rank == 0:
        record = {
            "environment": facts,
            "copy_bytes_per_second": out.machine.copy_rate,
            "figures": [figure.as_dict() for figure in out.figures],
        }
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    wait_for_all(world)
    if run.failed and world.rank == 0:
        raise SystemExit(f"{run.failed} measurements failed")


if __name__ == "__main__":
    main()
