"""Dispatch and combine inside a node of GPUs (or ranks of one GPU): time against the copy floor.

    bash launch/bench.sh                      # on a machine with a GPU: 8x16, 8x4 and 4x24
    bash launch/bench.sh --cases all --json results.json

Everything is checked against the oracle before it is timed. The cases are

- table: every call in a row of its like, and dispatches as their caller sees them, at each setting;
- sizes: 1, 8, 128 and 1024 tokens a rank; sms: 2 to 32 SMs a rank, as far as they fit;
- skew: the measured load profile of experts beside uniform routing;
- host: host time of small calls; gemm: beside matrix products; graph: replays of a CUDA graph.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from mpi4py import MPI

from .gpu import cases
from .gpu.exchange import Exchange
from .gpu.figures import Table
from .gpu.gemm import beside_gemm
from .gpu.graph import replay
from .gpu.options import SKEWED, SMALL_SIZES, Gpus, Options, Setting, parse
from .gpu.runner import Job, Measure, Runner, begin, end, find_gpus
from .gpu.timing import Effort

#: Seconds a rank may stay silent in the case "graph": a capture that cannot work ends sooner.
_GRAPH_TIMEOUT = 5.0


class _Run:
    """The cases, in turn. Collective over ``world``."""

    def __init__(self, world: Any, options: Options, gpus: Gpus, out: Table) -> None:
        self.options = options
        self.gpus = gpus
        ranks = [setting.ranks for setting in options.settings]
        self.runner = Runner(world, ranks, out, Effort(options.groups, options.calls))

    def on(
        self, setting: Setting, name: str, measure: Measure, timeout: float = 20.0, **changes: Any
    ) -> None:
        """Make and check an exchange and measure on it; ``changes`` to the shape."""
        shape = replace(self.options.shape, ranks=setting.ranks, **changes)
        self.runner.measure(name, Job(shape, setting.sms, timeout=timeout), measure)

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
    gpus = find_gpus(world)
    options = parse(gpus=gpus)
    facts, out = begin(world, gpus, options.ranks)
    run = _Run(world, options, gpus, out)
    for case in options.cases:
        run.case(case)
    out.definitions()
    for case in dict.fromkeys(figure.case for figure in out.figures):
        out.markdown(case)
    end(world, run.runner.failed, options.json, facts | out.as_dict())


if __name__ == "__main__":
    main()
