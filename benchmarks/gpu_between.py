"""Dispatch and combine between virtual nodes on a machine's GPUs: bytes, triggers, line rates.

    bash launch/bench.sh --nodes 2                     # on a machine with a GPU: 2 nodes x 4 ranks
    bash launch/bench.sh --nodes 2 4 --json results.json
    bash launch/bench.sh --nodes 2 --cases line --sms 4 8 --fabric "emulated rate=50 blocks=2"
    bash launch/bench.sh --nodes 2 4 --cases messages     # kernels against proxies, same network
    bash launch/bench.sh --nodes 2 --cases posting
    bash launch/bench.sh --nodes 2 --cases line --sms 8 --timeline trace.json

Everything is checked against the oracle before it is timed. The cases are

- proxy: over the fabric "proxy/local", whose copies the GPU makes: time against the copy floor,
  bytes of each kind of link, triggers, and the proxies' processor time;
- line: over emulated NICs of a modelled network, by SMs of a rank: shares of the line rate;
- messages: the same by the size of a message, posted by kernels and by proxies, side by side;
- triggers: what rings and proxy threads can do, by rings, threads and ranks;
- posting: how fast kernels post puts by themselves, and triggers for proxy threads.

With routing "gate" a token goes to at most four nodes. A fabric that this build lacks is said to be
so, and left out unless it was asked for.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from mpi4py import MPI

from epcomm.check import check_fabric
from epcomm.fabric.abi import transports
from epcomm.fabric.ladder import TRANSPORTS

from .gpu.exchange import FORMS
from .gpu.figures import Table
from .gpu.goals import Goals
from .gpu.network import name_of
from .gpu.nodes_cases import LineFigure, judge_line, line, proxy
from .gpu.nodes_compare import compare
from .gpu.nodes_options import MESSAGE_HIDDEN, Options, Setting, parse
from .gpu.nodes_posting import PostingTable, compare_posting, define_posting, measure_posting
from .gpu.nodes_triggers import (
    TriggerTable,
    judge_triggers,
    measure_triggers,
    numbers_of_ranks,
)
from .gpu.options import Gpus
from .gpu.picture import picture
from .gpu.runner import Job, Runner, begin, end, find_gpus
from .gpu.timing import Effort
from .triggers import KernelProducers


def _refusal(fabric: str, *, chosen: bool = False) -> str:
    """Why a GPU's buffer cannot have this fabric; empty if it can.

    Args:
        fabric: as Buffer takes it, with options.
        chosen: "auto" is no answer.
    """
    try:
        check_fabric(fabric, "cuda", None)
    except ValueError as error:
        return str(error)
    transport = TRANSPORTS.get(fabric.partition(" ")[0])
    if transport is None and chosen:
        return f"fabric: expected one of {', '.join(TRANSPORTS)}, got {fabric!r}"
    if transport is None or transport in transports:  # None: chosen when the buffer is made
        return ""
    return f"fabric: this library has no transport {transport!r}"


class _Run:
    """The cases, in turn. Collective over ``world``."""

    def __init__(self, world: Any, options: Options, gpus: Gpus, out: Table) -> None:
        self.world = world
        self.options = options
        self.gpus = gpus
        self.out = out
        self.goals = Goals(out)
        self.triggers = TriggerTable()
        self.posting = PostingTable()
        ranks = numbers_of_ranks(options.ranks)
        self.runner = Runner(world, ranks, out, Effort(options.groups, options.calls))

    def _settings(self, case: str) -> list[Setting]:
        """Those whose fabric there is."""
        settings = self.options.settings(case, self.gpus)
        return [s for s in settings if self._has(f"{case}: {s.nodes} nodes", _refusal(s.fabric))]

    def _has(self, what: str, refusal: str) -> bool:
        """Whether nothing is said against measuring; what was asked for and is not there fails."""
        if refusal:
            self.runner.failed += self.options.fabrics is not None
            self.out.say(f"  {what}, not measured: {refusal}")
        return not refusal

    def _job(self, setting: Setting, **changes: Any) -> Job:
        shape = replace(self.options.on(setting.nodes), **changes)
        return Job(shape, setting.sms, setting.fabric, self.options.staging)

    def case(self, case: str) -> None:
        """One of the cases."""
        if case == "proxy":
            for setting in self._settings(case):
                self.runner.measure(case, self._job(setting), partial(proxy, goals=self.goals))
        elif case == "line":
            self._lines()
        elif case == "messages":
            measure = partial(line, case=case, forms=("FP8 pair",), found=[])
            for setting in self._settings(case):
                for hidden in MESSAGE_HIDDEN:
                    self.runner.measure(case, self._job(setting, hidden=hidden), measure)
        elif case == "posting":
            for posting in self.options.postings:
                refusal = _refusal(posting.fabric, chosen=True)
                if self._has(f"{case}: {posting.fabric}", refusal):
                    measure_posting(self.runner, posting, self.posting, self.out)
        else:
            assert case == "triggers"
            shape = self.options.on(self.options.nodes[0])
            self.triggers = measure_triggers(self.runner, shape, KernelProducers, self.out)
            judge_triggers(self.world, self.triggers, shape, self.goals)

    def picture(self, path: str) -> None:
        """A timeline with the first setting that there is."""
        settings = [s for case in self.options.cases for s in self._settings(case)]
        if not settings:
            self.runner.failed += 1
            return
        job = replace(self._job(settings[0]), timeline=True)
        self.runner.measure("timeline", job, partial(picture, path=path))

    def _lines(self) -> None:
        """A sweep over SMs for each fabric and number of nodes, and what is wanted of it."""
        settings = self._settings("line")
        for nodes, fabric in dict.fromkeys((s.nodes, s.fabric) for s in settings):
            found: list[LineFigure] = []
            measure = partial(line, case="line", forms=FORMS[1:], found=found)
            for setting in (s for s in settings if (s.nodes, s.fabric) == (nodes, fabric)):
                self.runner.measure("line", self._job(setting), measure)
            place = f"{name_of(fabric)}, {nodes} x {self.options.ranks // nodes}"
            judge_line(self.goals, place, nodes, found)


def _define(out: Table) -> None:
    """Say what the columns mean."""
    out.definitions()
    out.say(
        "Between nodes the floor has each record besides, written into staging once and read from "
        "it once. copied %: the same share\n"
        "  when all copies count that ranks of one memory make: a record then lies in staging "
        "twice, and one place is copied to the other.\n"
        "up, out: bytes of a rank over links inside and between nodes, with everything; of least "
        "out: over rows and scales of\n"
        "  one record for each (token, other node). triggers: of a call, the rank with the most.\n"
        "proxy us: processor time of a rank's proxy threads, looks at empty rings included. moving "
        "us: between the moments at which\n"
        "  the slowest rank's kernel had all announcements and had moved its rows; one call.\n"
        "copies us: of all those copies at the copy rate. Where it comes near the line's time, the "
        "GPU's memory is the limit.\n"
        "Modelled network: data % of line: wire bytes that a rank sent (headers included) over the "
        "time from its first departure\n"
        "  until its last data had in fact been copied, over the NICs' rate; single calls, median, "
        "the rank with the least.\n"
        "  call %: over the time of a call. call over ideal: that time over bytes / rate + 2 "
        "latencies. late: messages that took\n"
        "  effect, or were copied, after the time of the model: the engine only ever adds time."
    )


def main() -> None:
    """Measure on all ranks, report on rank 0."""
    world = MPI.COMM_WORLD
    gpus = find_gpus(world)
    options = parse(gpus=gpus)
    record, out = begin(world, gpus, options.ranks)
    run = _Run(world, options, gpus, out)
    if options.timeline:
        run.picture(options.timeline)
    for case in () if options.timeline else options.cases:
        run.case(case)
    if out.figures:
        _define(out)
    for case in dict.fromkeys(figure.case for figure in out.figures):
        out.markdown(case)
        for text in compare([f for f in out.figures if f.case == case == "messages"]):
            out.say(text)
    for text in compare_posting(run.posting):
        out.say(text)
    if run.posting.trips:
        define_posting(out)
    run.goals.markdown()
    record |= out.as_dict() | {
        "goals": run.goals.as_list(),
        "triggers": run.triggers.as_dict(),
        "posting": run.posting.as_dict(),
    }
    end(world, run.runner.failed, options.json, record)


if __name__ == "__main__":
    main()
