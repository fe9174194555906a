"""What is measured of a call, and how it is shown."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ..floor import row_bytes
from .exchange import Exchange, Form
from .network import is_modelled, name_of

_WIDTH = 112
_HEADER = f"  {'':34}{'us':>10}{'floor us':>10}{'share':>7}{'GB/s':>8}{'GB/s SM':>9}{'host us':>9}"


@dataclass(frozen=True)
class Machine:
    """What the floor is reckoned with.

    Attributes:
        copy_rate: bytes a second read and written by a copy within one GPU, in this run.
        gpus: the ranks run on.
    """

    copy_rate: float
    gpus: int

    def floor_seconds(self, num_bytes: int) -> float:
        """Of so many bytes, read and written by all ranks together."""
        return num_bytes / (self.copy_rate * self.gpus)


@dataclass
class Figure:
    """One line.

    Attributes:
        case: of the benchmark.
        ranks: R.
        sms: of each rank.
        tokens: of each rank.
        routing: of the tokens.
        name: of the call.
        seconds: of a call.
        num_bytes: all ranks together must read and write, each once.
        floor_seconds: of those bytes at the copy rate.
        host_seconds: until a call returns, where measured.
        more: other measurements, by name, with the unit in it.
        nodes: N, equal groups of neighbouring ranks.
        fabric: between them, as Buffer takes it.
    """

    case: str
    ranks: int
    sms: int
    tokens: int
    routing: str
    name: str
    seconds: float
    num_bytes: int
    floor_seconds: float
    host_seconds: float | None = None
    more: dict[str, float] = field(default_factory=dict)
    nodes: int = 1
    fabric: str = "auto"

    @property
    def share(self) -> float:
        """Part of the floor's rate reached."""
        return self.floor_seconds / self.seconds

    @property
    def rate(self) -> float:
        """GB/s: ``num_bytes`` per second."""
        return self.num_bytes / self.seconds / 1e9

    @property
    def rate_of_sm(self) -> float:
        """GB/s of each SM that was given."""
        return self.rate / (self.ranks * self.sms)

    @property
    def label(self) -> str:
        """What distinguishes the exchange from others."""
        rest = f"{self.sms}, {self.tokens} tokens, {self.routing}"
        if self.nodes == 1:
            return f"{self.ranks} x {rest}"
        each = self.ranks // self.nodes
        return f"{name_of(self.fabric)}, {self.nodes} x {each} x {rest}"

    def __str__(self) -> str:
        host = "" if self.host_seconds is None else f"{self.host_seconds * 1e6:.1f}"
        line = (
            f"  {self.name:34}{self.seconds * 1e6:10.1f}{self.floor_seconds * 1e6:10.1f}"
            f"{self.share:7.0%}{self.rate:8.0f}{self.rate_of_sm:9.1f}{host:>9}"
        )
        more = ", ".join(f"{name} {value:.2f}" for name, value in self.more.items())
        return f"{line}  {more}" if more else line

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        modelled = self.nodes > 1 and is_modelled(self.fabric)
        return asdict(self) | {
            "share": self.share,
            "gigabytes_per_second": self.rate,
            "modelled_network": modelled,
        }


class Table:
    """Collects figures; prints each at once on rank 0.

    Args:
        machine: for the floors.
        prints: whether this rank does.
    """

    def __init__(self, machine: Machine, prints: bool) -> None:
        self.machine = machine
        self.figures: list[Figure] = []
        self._prints = prints

    def say(self, text: str) -> None:
        """Print a line."""
        if self._prints:
            print(text, flush=True)

    def title(self, case: str, exchange: Exchange) -> None:
        """Begin the figures of an exchange."""
        shape = exchange.shape
        busiest = max(exchange.rows_R) * shape.ranks / max(exchange.copies, 1)
        ranks = f"{shape.ranks} ranks"
        if shape.nodes > 1:
            ranks = (
                f"{name_of(exchange.fabric)}, {shape.nodes} nodes x {shape.ranks_per_node} ranks"
            )
        self.say("-" * _WIDTH)
        self.say(
            f"{case}: {ranks} x {exchange.sms} SMs, {shape.tokens} tokens a rank, "
            f"hidden {shape.hidden}, top-{shape.topk} of {shape.experts}, routing {shape.routing}: "
            f"{exchange.copies / (shape.tokens * shape.ranks):.2f} ranks a token, busiest rank "
            f"{busiest:.2f} x mean; checked"
        )
        self.say(_HEADER)

    def add(
        self,
        case: str,
        exchange: Exchange,
        name: str,
        seconds: float,
        num_bytes: int,
        host_seconds: float | None = None,
        **more: float,
    ) -> None:
        """One more figure; ``more`` by name, with _ for a space."""
        shape = exchange.shape
        figure = Figure(
            case=case,
            ranks=shape.ranks,
            sms=exchange.sms,
            tokens=shape.tokens,
            routing=shape.routing,
            name=name,
            seconds=seconds,
            num_bytes=num_bytes,
            floor_seconds=self.machine.floor_seconds(num_bytes),
            host_seconds=host_seconds,
            more={key.replace("_", " "): value for key, value in more.items()},
            nodes=shape.nodes,
            fabric=exchange.fabric,
        )
        self.figures.append(figure)
        self.say(str(figure))

    def definitions(self) -> None:
        """Say what the columns mean."""
        several = f" x {self.machine.gpus} GPUs" if self.machine.gpus > 1 else ""
        self.say("-" * _WIDTH)
        self.say(
            "us: a call of the slowest rank, median over groups of calls, by CUDA events around a "
            "group.\n"
            "Floor: every input byte read once and every output byte written once (rows and "
            f"scales, no metadata), at the\n  copy rate of this run, "
            f"{self.machine.copy_rate / 1e12:.3f} TB/s read plus written{several}. What fits in "
            "the L2 caches can be faster. Links between GPUs are not in it.\n"
            "GB/s: the floor's bytes over the time, all ranks together; GB/s SM: of each SM that "
            "was given.\n"
            "host us: until a call returns, a few calls on an idle GPU; a first dispatch waits for "
            "its row count there."
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "copy_bytes_per_second": self.machine.copy_rate,
            "figures": [figure.as_dict() for figure in self.figures],
        }

    def markdown(self, case: str) -> None:
        """The figures of a case again, as a table for a document: us (share of the floor)."""
        figures = [figure for figure in self.figures if figure.case == case]
        if figures and any(figure.more for figure in figures):
            self._markdown_lines(figures)
        elif figures:
            self._markdown_matrix(figures)

    def _markdown_matrix(self, figures: list[Figure]) -> None:
        """A line for each exchange, a column for each call."""
        names = list(dict.fromkeys(figure.name for figure in figures))
        sweep = figures[0].case == "sms"
        unit = "us (share, GB/s of an SM)" if sweep else "us (share)"
        self.say(f"\n| {figures[0].case}, {unit} | {' | '.join(names)} |")
        self.say(f"|{'---|' * (len(names) + 1)}")
        for label in dict.fromkeys(figure.label for figure in figures):
            cells = {f.name: f for f in figures if f.label == label}
            texts = []
            for figure in (cells[name] for name in names if name in cells):
                of_sm = f", {figure.rate_of_sm:.1f}" if sweep else ""
                texts.append(f"{figure.seconds * 1e6:.0f} ({figure.share:.0%}{of_sm})")
            self.say(f"| {label} | {' | '.join(texts)} |")

    def _markdown_lines(self, figures: list[Figure]) -> None:
        """A line for each figure, with what else was measured in columns."""
        more = list(dict.fromkeys(name for figure in figures for name in figure.more))
        self.say(f"\n| {figures[0].case} | call | us (share) | {' | '.join(more)} |")
        self.say(f"|{'---|' * (len(more) + 3)}")
        for figure in figures:
            others = [f"{figure.more[n]:.2f}" if n in figure.more else "" for n in more]
            time = f"{figure.seconds * 1e6:.0f} ({figure.share:.0%})"
            self.say(f"| {figure.label} | {figure.name} | {time} | {' | '.join(others)} |")


def least_bytes(exchange: Exchange, form: Form | None) -> int:
    """Bytes all ranks must read and write: of a dispatch of ``form``, or None: a combine.

    The metadata of rows are not counted.
    """
    hidden = exchange.shape.hidden
    bf16, fp8 = row_bytes("bf16", hidden), row_bytes("fp8", hidden)
    read = fp8 if form == "FP8 pair" else bf16
    write = bf16 if form in ("BF16", None) else fp8
    tokens = exchange.shape.tokens * exchange.shape.ranks
    if form is None:  # a combine reads rows and writes tokens
        return exchange.copies * read + tokens * write
    return tokens * read + exchange.copies * write
