"""Runs measurements in turn, each on as many of the ranks as it wants."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from ..measure import wait_for_all
from ..options import Shape
from ..report import environment, print_environment
from .check import check, check_small
from .exchange import Exchange
from .figures import Machine, Table
from .lockstep import Lockstep
from .options import Gpus
from .timing import Effort, copy_rate

Measure = Callable[[Exchange, Table, Effort], None]


def find_gpus(world: Any) -> Gpus:
    """The GPUs the ranks use; collective."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = world.allgather((str(properties.uuid), properties.multi_processor_count))
    return Gpus(len({uuid for uuid, _ in found}), min(sms for _, sms in found))


def measure_copy_rate(world: Any) -> float:
    """Of rank 0's GPU, while the other ranks leave it alone; collective."""
    rate = copy_rate() if world.rank == 0 else 0.0
    wait_for_all(world)
    return world.bcast(rate)


def begin(world: Any, gpus: Gpus, ranks: int) -> tuple[dict[str, Any], Table]:
    """Say what is measured on; the facts for a JSON file, and a table. Collective."""
    if world.size < ranks:
        raise SystemExit(f"{ranks} ranks are needed; mpirun made {world.size}")
    facts = environment() | {"gpu": torch.cuda.get_device_name(), "gpus": gpus.count}
    out = Table(Machine(measure_copy_rate(world), gpus.count), world.rank == 0)
    if world.rank == 0:
        print_environment(facts)
    out.say(
        f"{facts['gpus']} x {facts['gpu']}, {gpus.sms} SMs; copy rate "
        f"{out.machine.copy_rate / 1e12:.3f} TB/s, read plus written"
    )
    return {"environment": facts}, out


def end(world: Any, failed: int, path: str | None, record: dict[str, Any]) -> None:
    """Write all numbers; fail on rank 0 where something could not be measured. Collective."""
    if path and world.rank == 0:
        Path(path).write_text(json.dumps(record, indent=1) + "\n")
    wait_for_all(world)
    if failed and world.rank == 0:
        raise SystemExit(f"{failed} measurements failed")


@dataclass(frozen=True)
class Job:
    """An exchange to make, check and measure on.

    Attributes:
        shape: what is exchanged.
        sms: of each rank.
        fabric: between nodes, as Buffer takes it.
        staging: most bytes of it, as Buffer's ``max_staging_bytes`` takes them.
        timeout: seconds a rank may stay silent.
        timeline: whether its buffer notes one.
    """

    shape: Shape
    sms: int
    fabric: str = "auto"
    staging: int | None = None
    timeout: float = 20.0
    timeline: bool = False

    def __str__(self) -> str:
        shape = self.shape
        ranks = str(shape.ranks) if shape.nodes == 1 else f"{shape.nodes}x{shape.ranks_per_node}"
        over = "" if shape.nodes == 1 else f" over {self.fabric}"
        within = "" if self.staging is None else f", {self.staging >> 20} MiB of staging"
        return f"{ranks}x{self.sms} {shape.tokens} tokens{over}{within}"


class Runner:
    """Collective over ``world``, whatever number of ranks a job has.

    Args:
        world: all ranks.
        ranks: numbers of ranks that jobs will have.
        out: takes the figures.
        effort: of each measurement.
    """

    def __init__(self, world: Any, ranks: Iterable[int], out: Table, effort: Effort) -> None:
        self.failed = 0  # measurements that came to nothing
        self._world = world
        self._out = out
        self._effort = effort
        self._checked: set[tuple[int, int, int, str]] = set()
        self._comms: dict[int, Any] = {}
        for count in dict.fromkeys(ranks):
            color = 0 if world.rank < count else MPI.UNDEFINED
            self._comms[count] = world.Split(color, world.rank)
        self._locksteps = {
            count: Lockstep(comm) for count, comm in self._comms.items() if comm != MPI.COMM_NULL
        }

    def measure(self, name: str, job: Job, measure: Measure) -> None:
        """Make the exchange, check what it delivers, and measure on it."""
        self.attempt(f"{name} {job}", job.shape.ranks, partial(self._exchange, job, measure))

    def attempt(self, name: str, ranks: int, action: Callable[[Any], None]) -> None:
        """Run ``action(comm)`` on the first ``ranks`` ranks; the others wait."""
        lockstep = self._locksteps.get(ranks)
        if lockstep is not None:
            done = lockstep.attempt(name, partial(action, self._comms[ranks]))
            self.failed += not done
        wait_for_all(self._world)

    def _exchange(self, job: Job, measure: Measure, comm: Any) -> None:
        shape = job.shape
        kind = (shape.ranks, shape.nodes, job.sms, job.fabric)
        if kind not in self._checked:
            check_small(comm, shape, job.sms, job.fabric)
            self._checked.add(kind)
        with Exchange(
            comm,
            shape,
            job.sms,
            job.timeout,
            fabric=job.fabric,
            staging=job.staging,
            timeline=job.timeline,
        ) as exchange:
            check(exchange)
            measure(exchange, self._out, self._effort)
