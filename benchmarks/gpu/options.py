"""The command line of the GPU benchmark.

Run as a program, after the numbers of GPUs and of SMs on each, it prints what the launcher needs:
ranks, SMs of a rank, and the settings that fit. It imports nothing heavy for that reason.
"""

import argparse
import math
import sys
from dataclasses import dataclass, replace

from ..options import Shape, positive

CASES = ("table", "sizes", "sms", "skew", "host", "gemm", "graph")
#: Tokens of a rank in the case "sizes", beside those asked for.
SMALL_SIZES = (1, 8, 128, 1024)
#: SMs of a rank in the case "sms".
SWEPT_SMS = (2, 4, 8, 16, 24, 32)
SKEWED = "profile:prefill_in4096"
_DEFAULT = ((8, 16), (8, 4), (4, 24))


@dataclass(frozen=True, order=True)
class Setting:
    """Ranks, and SMs of each."""

    ranks: int
    sms: int

    def __str__(self) -> str:
        return f"{self.ranks}x{self.sms}"

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """From ``8x16``."""
        ranks, _, sms = text.partition("x")
        if not (ranks.isdecimal() and sms.isdecimal() and int(ranks) > 0 and int(sms) > 0):
            raise argparse.ArgumentTypeError(f"expected RANKSxSMS such as 8x16, got {text!r}")
        return cls(int(ranks), int(sms))


@dataclass(frozen=True)
class Gpus:
    """The GPUs of the machine, all alike."""

    count: int
    sms: int

    def most_sms(self, ranks: int) -> int:
        """SMs a rank can have where the blocks of all must be resident together."""
        return self.sms // -(-ranks // self.count)

    def fits(self, setting: Setting) -> bool:
        """Whether all blocks of a setting can be resident together."""
        return setting.sms <= self.most_sms(setting.ranks)


@dataclass(frozen=True)
class Options:
    """The whole run.

    Attributes:
        settings: ranks and SMs to measure, in order.
        cases: of CASES, in that order.
        shape: what is exchanged; its ranks are those of the first setting.
        groups: of calls; a figure is the median over them.
        calls: of a group.
        json: file for all numbers, or None.
    """

    settings: list[Setting]
    cases: list[str]
    shape: Shape
    groups: int
    calls: int
    json: str | None

    @property
    def ranks(self) -> int:
        """Ranks to launch."""
        return max(setting.ranks for setting in self.settings)

    def swept(self, gpus: Gpus) -> list[Setting]:
        """The settings of the case "sms": those that fit, for every number of ranks."""
        counts = dict.fromkeys(setting.ranks for setting in self.settings)
        swept = [Setting(ranks, sms) for ranks in counts for sms in SWEPT_SMS]
        return [setting for setting in swept if gpus.fits(setting)]


def default_settings(gpus: Gpus | None) -> list[Setting]:
    """8x16, 8x4 and 4x24, with fewer SMs where so many do not fit."""
    settings = [Setting(*pair) for pair in _DEFAULT]
    if gpus is not None:
        settings = [replace(s, sms=min(s.sms, gpus.most_sms(s.ranks))) for s in settings]
    return list(dict.fromkeys(s for s in settings if s.sms > 0))


def add_exchange(parser: argparse.ArgumentParser, routing: str) -> None:
    """Options of every GPU benchmark: what is exchanged, how often, and where the numbers go."""
    add = parser.add_argument
    add("--tokens", type=positive, default=4096, help="tokens of a rank")
    add("--hidden", type=positive, default=7168)
    add("--experts", type=positive, default=256, help="experts of all ranks together")
    add("--topk", type=positive, default=8, help="experts per token")
    add("--routing", default=routing, help="as epcomm.routing.make_routing takes it")
    add("--groups", type=positive, default=7, help="groups of calls to take the median of")
    add("--calls", type=positive, default=6, help="calls of a group")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE", help="write all numbers")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/bench.sh",
        description="Time dispatch and combine among GPUs, or ranks of a GPU, against the floor.",
        epilog="Without a GPU, or with --cpu, launch/bench.sh has other options: "
        "'launch/bench.sh --cpu --help'.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=(*CASES, "all"), default=["table"])
    add("--settings", nargs="+", type=Setting.parse, metavar="RANKSxSMS", help="what to measure")
    add("--nodes", type=int, choices=[1], default=1, help="more: see --nodes 2 --help")
    add_exchange(parser, routing="uniform")
    return parser


def parse(arguments: list[str] | None = None, gpus: Gpus | None = None) -> Options:
    """Read the command line; ends the program with a message when it makes no sense.

    Args:
        arguments: of the command line; None: the program's own.
        gpus: where known, settings must fit them.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    settings = given.settings or default_settings(gpus)
    divides = math.lcm(*(setting.ranks for setting in settings))
    for setting in settings:
        if given.experts % setting.ranks:
            fits = -(-given.experts // divides) * divides
            parser.error(
                f"--experts {given.experts} does not divide among {setting.ranks} ranks; "
                f"{fits} would, in all settings"
            )
        if gpus is not None and not gpus.fits(setting):
            parser.error(
                f"--settings {setting}: at most {gpus.most_sms(setting.ranks)} SMs for each of "
                f"{setting.ranks} ranks fit {gpus.count} GPUs of {gpus.sms} SMs"
            )
    # Groups of a gate limited as DeepSeek-V3's; uniform routing knows none.
    grouped = given.experts % 8 == 0 and given.experts // 8 * 4 >= given.topk
    shape = Shape(
        ranks=settings[0].ranks,
        nodes=1,
        tokens=given.tokens,
        hidden=given.hidden,
        experts=given.experts,
        topk=given.topk,
        groups=8 if grouped else 1,
        topk_groups=4 if grouped else 1,
        routing=given.routing,
        dispatch_format="bf16",
        combine_format="bf16",
        layout="rank",
        seed=given.seed,
    )
    cases = [case for case in CASES if case in given.cases or "all" in given.cases]
    return Options(settings, cases, shape, given.groups, given.calls, given.json)


def main() -> None:
    """Print ranks, SMs and settings for the launcher."""
    count, sms, *arguments = sys.argv[1:]
    options = parse(arguments, Gpus(int(count), int(sms)))
    most = max(s.sms for s in options.settings if s.ranks == options.ranks)
    print(options.ranks, most, *options.settings)


if __name__ == "__main__":
    main()
