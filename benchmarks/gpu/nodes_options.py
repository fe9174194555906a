"""The command line of the GPU benchmark between virtual nodes.

Run as a program, after the numbers of GPUs and of SMs on each, it prints what the launcher needs:
ranks, and SMs of a rank with its NIC's.
"""

import argparse
import sys
from dataclasses import dataclass, replace

from epcomm.cuda.nics import nic_sms

from ..options import Shape, positive
from .options import Gpus, add_exchange

CASES = ("proxy", "line", "messages", "triggers", "posting")
#: SMs of a rank: where the copies are the limit, and where the line should be.
PROXY_SMS = (16, 12)
LINE_SMS = (2, 4, 6, 8, 12)
#: Row lengths in the case "messages": a message is a chunk of so many records whatever their size.
MESSAGE_HIDDEN = (256, 512, 1024, 2048, 4096, 7168)
_MESSAGE_SMS = 8
#: With two blocks, as NICs have otherwise, a busy GPU copies long messages behind the model's time.
_NIC = "rate=50 latency_ns=2000 planes=1 blocks=4"
PROXY_FABRICS = ("proxy/local",)
LINE_FABRICS = (f"emulated {_NIC}",)
MESSAGE_FABRICS = (f"emulated {_NIC}", f"proxy/emulated {_NIC}", "proxy/local")
#: The same cards, with nothing left of the model but 0.3 us from a doorbell to the wire.
_NO_LINE = "rate=0 latency_ns=0 planes=1 blocks=4"
#: At most so many nodes for a token, as DeepSeek-V3's gate limits it.
_MOST_NODES = 4


@dataclass(frozen=True)
class Setting:
    """What is measured with: SMs of each rank, and what is between nodes."""

    nodes: int
    sms: int
    fabric: str


@dataclass(frozen=True)
class Posting:
    """What the case "posting" measures over: a fabric; rates too, or only times of single puts."""

    fabric: str
    rates: bool


POSTINGS = tuple(
    Posting(f"{name} {line}", rates)
    for line, rates in ((_NIC, True), (_NO_LINE, False))
    for name in ("emulated", "proxy/emulated")
)


@dataclass(frozen=True)
class Options:
    """The whole run.

    Attributes:
        shape: what is exchanged; ``on`` makes it one of several numbers of nodes.
        nodes: numbers of nodes to measure, in order.
        cases: of CASES, in that order.
        sms: of a rank; None: those of the case.
        fabrics: None: those of the case.
        staging: most bytes of it on a rank; None: a place for every record.
        groups: of calls; a figure is the median over them.
        calls: of a group.
        json: file for all numbers, or None.
        timeline: file for a trace, which is then all that is made, or None.
    """

    shape: Shape
    nodes: list[int]
    cases: list[str]
    sms: list[int] | None
    fabrics: list[str] | None
    staging: int | None
    groups: int
    calls: int
    json: str | None
    timeline: str | None = None

    @property
    def ranks(self) -> int:
        """Ranks to launch."""
        return self.shape.ranks

    def on(self, nodes: int) -> Shape:
        """The exchange among so many nodes. The gate's groups are their experts."""
        return replace(self.shape, nodes=nodes, groups=nodes, topk_groups=min(_MOST_NODES, nodes))

    def settings(self, case: str, gpus: Gpus | None) -> list[Setting]:
        """What a case measures, in order: what fits, of its own; all that was asked for."""
        fabrics = {"proxy": PROXY_FABRICS, "line": LINE_FABRICS, "messages": MESSAGE_FABRICS}
        numbers = {"proxy": PROXY_SMS, "line": LINE_SMS, "messages": (_MESSAGE_SMS,)}
        found: dict[Setting, None] = {}
        for nodes in self.nodes if case in fabrics else ():
            for fabric in self.fabrics or fabrics[case]:
                room = sys.maxsize
                if gpus is not None:
                    room = gpus.most_sms(self.ranks) - nic_sms(fabric)
                for sms in self.sms or numbers[case]:
                    fitting = sms if self.sms else min(sms, room)
                    if fitting > 0:
                        found[Setting(nodes, fitting, fabric)] = None
        return list(found)

    @property
    def postings(self) -> list[Posting]:
        """What the case "posting" measures, in order: its own, or all of what was asked for."""
        return [Posting(fabric, True) for fabric in self.fabrics or ()] or list(POSTINGS)

    def most_sms(self, gpus: Gpus | None) -> int:
        """SMs of a rank and its NICs in the largest setting."""
        settings = [setting for case in self.cases for setting in self.settings(case, gpus)]
        return max((s.sms + nic_sms(s.fabric) for s in settings), default=1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/bench.sh",
        description="Time dispatch and combine between virtual nodes of a machine's GPUs: bytes, "
        "triggers, share of the copy floor, share of a modelled network's line rate.",
        epilog="Without a GPU, or with --cpu, launch/bench.sh has other options: "
        "'launch/bench.sh --cpu --help'.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--nodes", type=positive, nargs="+", default=[2], help="numbers of nodes, above 1")
    add("--ranks", type=positive, default=8, help="of all nodes together")
    add("--cases", nargs="+", choices=(*CASES, "all"), default=["all"])
    add("--fabric", nargs="+", metavar="FABRIC", help="instead of the cases' own")
    add("--sms", type=positive, nargs="+", help="of a rank, instead of the cases' own")
    add("--staging", type=positive, metavar="MIB", help="most of it on a rank, instead of all")
    add_exchange(parser, routing="gate")
    add(
        "--timeline",
        metavar="FILE",
        help="time nothing: write a Chrome trace of a dispatch and a combine on all ranks, with "
        "the first setting of the cases",
    )
    return parser


def parse(arguments: list[str] | None = None, gpus: Gpus | None = None) -> Options:
    """Read the command line; ends the program with a message when it makes no sense.

    Args:
        arguments: of the command line; None: the program's own.
        gpus: where known, settings must fit them.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    for nodes in given.nodes:
        if nodes < 2 or given.ranks % nodes:
            parser.error(f"--nodes {nodes}: expected 2 or more that divide --ranks {given.ranks}")
        reach = given.experts // nodes * min(_MOST_NODES, nodes)
        if given.experts % nodes or reach < given.topk:
            parser.error(
                f"--topk {given.topk}: the gate finds {reach} of --experts {given.experts} on "
                f"{min(_MOST_NODES, nodes)} of {nodes} nodes"
            )
    if given.experts % given.ranks:
        parser.error(f"--experts {given.experts} does not divide among --ranks {given.ranks}")
    shape = Shape(
        ranks=given.ranks,
        nodes=1,
        tokens=given.tokens,
        hidden=given.hidden,
        experts=given.experts,
        topk=given.topk,
        groups=1,
        topk_groups=1,
        routing=given.routing,
        dispatch_format="fp8",
        combine_format="bf16",
        layout="rank",
        seed=given.seed,
    )
    try:
        for fabric in given.fabric or ():
            nic_sms(fabric)
    except ValueError as error:
        parser.error(f"--{error}")
    options = Options(
        shape=shape,
        nodes=list(dict.fromkeys(given.nodes)),
        cases=[case for case in CASES if case in given.cases or "all" in given.cases],
        sms=given.sms,
        fabrics=given.fabric,
        staging=None if given.staging is None else given.staging << 20,
        groups=given.groups,
        calls=given.calls,
        json=given.json,
        timeline=given.timeline,
    )
    if options.timeline and not any(options.settings(case, gpus) for case in options.cases):
        parser.error("--timeline: expected a case with settings, such as --cases line")
    if gpus is not None:
        _check_room(parser, options, gpus)
    return options


def _check_room(parser: argparse.ArgumentParser, options: Options, gpus: Gpus) -> None:
    """All blocks of ranks and NICs must be resident together."""
    room = gpus.most_sms(options.ranks)
    where = f"each of {options.ranks} ranks on {gpus.count} GPUs of {gpus.sms} SMs"
    if room < 1:
        parser.error(f"--ranks {options.ranks}: no SM is left for {where}")
    for setting in (s for case in options.cases for s in options.settings(case, gpus)):
        if setting.sms + nic_sms(setting.fabric) > room:
            nic = nic_sms(setting.fabric)
            beside = f" beside {nic} of its NICs" if nic else ""
            parser.error(f"--sms {setting.sms}{beside}: at most {room} fit for {where}")


def main() -> None:
    """Print ranks and SMs for the launcher."""
    count, sms, *arguments = sys.argv[1:]
    gpus = Gpus(int(count), int(sms))
    # Of a machine without a GPU, to which --help is all that is asked.
    options = parse(arguments, gpus if gpus.count else None)
    print(options.ranks, options.most_sms(gpus))


if __name__ == "__main__":
    main()
