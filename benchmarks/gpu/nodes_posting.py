"""The case "posting": puts that kernels post by themselves beside triggers for proxy threads."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from epcomm.bootstrap import make_bootstrap

from ..posting import PostingSweep, PostingWorld, Writers
from .figures import Table
from .network import Line, is_modelled, name_of
from .nodes_options import Posting
from .runner import Runner

SWEEP = PostingSweep()
#: Bytes of a signal on the wire, without headers.
_SIGNAL = 8
#: Percent of messages that were copied too late, above which the copier was the limit.
_MOST_LATE = 1.0


@dataclass(frozen=True)
class PutFigure:
    """Of puts, each with a signal.

    Attributes:
        fabric: with its options.
        direct: posted by kernels; else triggers.
        nbytes: of a put, without its signal.
    """

    fabric: str
    direct: bool
    nbytes: int


@dataclass(frozen=True)
class RateFigure(PutFigure):
    """Puts in a second.

    Attributes:
        queue_pairs: that are posted to at the same time.
        warps: that share a queue pair, one thread of each.
        posted: million puts/s until the last was posted, of as many as fit into queues or rings.
        floor: million/s of the same stores and fences, by as many warps, with nobody to read them.
        completed: million puts/s until the last was known to have arrived, of many more.
        wire_share: bytes on the wire of these over the line's rate, 0 to 1; None: there is no line.
        late_copies: percent of messages that were copied later than the model says.
    """

    queue_pairs: int
    warps: int
    posted: float
    floor: float
    completed: float
    wire_share: float | None
    late_copies: float

    @property
    def share(self) -> float:
        """Of the floor, reached by posting."""
        return self.posted / self.floor

    @property
    def gigabytes(self) -> float:
        """GB/s of payload, of puts that complete."""
        return self.completed * self.nbytes / 1e3

    def __str__(self) -> str:
        line = "" if self.wire_share is None else f", {self.wire_share:.1%} of the line"
        late = f", copied late {self.late_copies:.0f} %" if self.late_copies > _MOST_LATE else ""
        return (
            f"  {self.nbytes:6d} B, {self.queue_pairs:2d} queue pairs x {self.warps} warps: posted "
            f"{self.posted:7.3f} M/s, {self.share:4.0%} of the floor {self.floor:.3f}; completed "
            f"{self.completed:.3f} M/s, {self.gigabytes:.2f} GB/s{line}{late}"
        )


@dataclass(frozen=True)
class TripFigure(PutFigure):
    """One put after the other by one thread; microseconds.

    Attributes:
        median: from a put's begin until its writer saw its completion.
        shortest: the same.
        slow: the same, 95 % are shorter.
        call: the shortest until the doorbell has rung; None: proxy threads ring.
        doorbell: the shortest from there until the writer saw the completion.
    """

    median: float
    shortest: float
    slow: float
    call: float | None
    doorbell: float | None

    def __str__(self) -> str:
        parts = ""
        if self.call is not None:
            parts = (
                f"; shortest call with its doorbell {self.call:.1f}, doorbell to completion "
                f"{self.doorbell:.1f}"
            )
        return (
            f"  {self.nbytes:6d} B, put to completion: median {self.median:.1f} us, shortest "
            f"{self.shortest:.1f}, 95 % below {self.slow:.1f}{parts}"
        )


@dataclass
class PostingTable:
    """What was measured; the same on both ranks that took part."""

    rates: list[RateFigure] = field(default_factory=list)
    trips: list[TripFigure] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        rates = [asdict(f) | {"share": f.share} | _modelled(f.fabric) for f in self.rates]
        return {"rates": rates, "trips": [asdict(f) | _modelled(f.fabric) for f in self.trips]}


def _modelled(fabric: str) -> dict[str, bool]:
    return {"modelled_network": is_modelled(fabric)}


def measure_posting(
    runner: Runner, posting: Posting, table: PostingTable, out: Table, sweep: PostingSweep = SWEEP
) -> None:
    """Measure over one fabric, between the first two ranks, appending to ``table``. Collective."""

    def measure(comm: Any) -> None:
        world = PostingWorld(comm, make_bootstrap(comm), posting.fabric, sweep)
        try:
            out.say(f"posting: {name_of(posting.fabric)}: {world.fabric.describe()}; checked")
            for nbytes in sweep.sizes:
                for writers in sweep.writers if posting.rates else ():
                    table.rates.append(measure_rate(world, posting.fabric, writers, nbytes, sweep))
                    out.say(str(table.rates[-1]))
                table.trips.append(measure_trips(world, posting.fabric, nbytes))
                out.say(str(table.trips[-1]))
        finally:
            world.close()

    runner.attempt(f"posting over {posting.fabric}", 2, measure)


def measure_rate(
    world: PostingWorld, fabric: str, writers: Writers, nbytes: int, sweep: PostingSweep
) -> RateFigure:
    """Check what arrives, then time. Collective over two ranks."""
    world.clear()
    world.by_writer(partial(world.put, writers, nbytes, sweep.burst))
    world.check(writers, nbytes)

    def times() -> dict[str, Any]:
        seen = []
        world.fabric.count(restart=True)
        for _ in range(sweep.repeats):
            floor = world.floor(writers, nbytes, sweep.burst)
            burst = world.put(writers, nbytes, sweep.burst)
            many = world.put(writers, nbytes, sweep.many)
            seen.append((burst.posted, floor.posted, many.completed))
        ns = np.median(np.array(seen), axis=0)
        puts = writers.queue_pairs * np.array([sweep.burst, sweep.burst, sweep.many])
        posted, floor_rate, completed = (puts / ns * 1e3).tolist()
        return {"posted": posted, "floor": floor_rate, "completed": completed} | of_line(
            world.fabric.count(), completed, nbytes
        )

    found = world.by_writer(times)
    world.check(writers, nbytes)
    place = (fabric, world.direct, nbytes, writers.queue_pairs, writers.warps)
    return RateFigure(*place, **found)


def of_line(traffic: np.ndarray | None, rate: float, nbytes: int) -> dict[str, float | None]:
    """``wire_share`` and ``late_copies`` of puts that complete, ``rate`` million in a second.

    Args:
        traffic: what the NICs counted, 0-d; None: no network is modelled.
        rate: of the puts.
        nbytes: of a put, without its signal.
    """
    if traffic is None:
        return {"wire_share": None, "late_copies": 0.0}
    line = Line.of(traffic)
    late = 100 * int(traffic["late_copies"]) / max(1, int(traffic["messages"]))
    if line.bytes_per_second == 0:
        return {"wire_share": None, "late_copies": late}
    wire = line.wire_bytes(nbytes) + line.wire_bytes(_SIGNAL)
    return {"wire_share": line.share(wire, 1e-6 / rate), "late_copies": late}


def measure_trips(world: PostingWorld, fabric: str, nbytes: int) -> TripFigure:
    """Check what arrives, after the puts that are timed. Collective over two ranks."""

    def times() -> tuple[list[float], list[float | None]]:
        world.trips(nbytes)  # warms up
        ns = np.sort(world.trips(nbytes))
        quantiles = [float(ns[len(ns) // 2]), float(ns[0]), float(ns[len(ns) * 95 // 100])]
        split = world.split(nbytes) if world.direct else (None, None)
        return quantiles, list(split)

    world.clear()
    quantiles, split = world.by_writer(times)
    world.check(Writers(1, 1), nbytes)
    numbers = [None if ns is None else ns / 1e3 for ns in (*quantiles, *split)]
    return TripFigure(fabric, world.direct, nbytes, *numbers)  # type: ignore[arg-type]


# Side by side -----------------------------------------------------------------------------


def compare_posting(table: PostingTable) -> list[str]:
    """Markdown tables: kernels that post beside proxies, for each line, size and writers."""
    return _rate_table(table.rates) + _trip_table(table.trips)


def _pairs(
    figures: Sequence[Any], key: Callable[[Any], tuple[Any, ...]]
) -> dict[tuple[Any, ...], dict[bool, Any]]:
    """Those of kernels and of proxies that differ in nothing else, in order."""
    found: dict[tuple[Any, ...], dict[bool, Any]] = {}
    for figure in figures:
        found.setdefault(key(figure), {})[figure.direct] = figure
    return found


def _line_of(fabric: str) -> str:
    """What the fabric is without who posts to it."""
    name, _, options = fabric.partition(" ")
    return f"{name_of(name.removeprefix('proxy/'))} {options}".strip()


def _rate_table(figures: Sequence[RateFigure]) -> list[str]:
    lines = [
        "",
        "Million puts with a signal a second: posted (share of the floor), and completed:",
        "",
        "| network | bytes | queue pairs | warps each | kernels posted | kernels completed "
        "| proxies posted | proxies completed | kernels over proxies, posted | completed |",
        f"|{'---|' * 10}",
    ]
    pairs = _pairs(figures, lambda f: (_line_of(f.fabric), f.nbytes, f.queue_pairs, f.warps))
    for place, found in pairs.items():
        kernels, proxies = found.get(True), found.get(False)
        cells = [*map(str, place)]
        for figure in (kernels, proxies):
            cells += ["", ""] if figure is None else [_posted(figure), _completed(figure)]
        for name in ("posted", "completed"):
            cells.append(_ratio(kernels, proxies, name))
        lines.append(f"| {' | '.join(cells)} |")
    return lines if figures else []


def _posted(figure: RateFigure) -> str:
    return f"{figure.posted:.3f} ({figure.share:.0%} of {figure.floor:.2f})"


def _completed(figure: RateFigure) -> str:
    says = [f"{figure.gigabytes:.2f} GB/s"]
    if figure.wire_share is not None:
        says.append(f"{figure.wire_share:.1%} of the line")
    if figure.late_copies > _MOST_LATE:
        says.append(f"late {figure.late_copies:.0f} %")
    return f"{figure.completed:.3f} ({', '.join(says)})"


def _ratio(kernels: Any, proxies: Any, name: str) -> str:
    """The first over the second; above 1 of a rate, the first is faster."""
    if kernels is None or proxies is None:
        return ""
    return f"{getattr(kernels, name) / getattr(proxies, name):.2f}"


def _trip_table(figures: Sequence[TripFigure]) -> list[str]:
    lines = [
        "",
        "One put with a signal at a time, us, until its writer sees its completion:",
        "",
        "| network | bytes | kernels, median (95 % below) | shortest: put to completion, call with "
        "its doorbell, doorbell to completion | proxies, median (95 % below) | proxies shortest "
        "| proxies over kernels |",
        f"|{'---|' * 7}",
    ]
    pairs = _pairs(figures, lambda f: (_line_of(f.fabric), f.nbytes))
    for place, found in pairs.items():
        kernels, proxies = found.get(True), found.get(False)
        cells = [*map(str, place), "", "", "", "", _ratio(proxies, kernels, "median")]
        if kernels is not None:
            cells[2] = f"{kernels.median:.1f} ({kernels.slow:.1f})"
            cells[3] = f"{kernels.shortest:.1f}, {kernels.call:.1f}, {kernels.doorbell:.1f}"
        if proxies is not None:
            cells[4] = f"{proxies.median:.1f} ({proxies.slow:.1f})"
            cells[5] = f"{proxies.shortest:.1f}"
        lines.append(f"| {' | '.join(cells)} |")
    return lines if figures else []


def define_posting(out: Table) -> None:
    """Say what the figures are."""
    out.say(
        "A put has a signal with it: two 64-byte requests and a doorbell of a kernel (or the "
        "doorbell of who rings for several), or a trigger of 16\n"
        "  bytes, of which a proxy thread makes these. One thread of each warp puts; rank 0 to "
        "rank 1. All of one kernel, by the timer of its GPU; median of\n"
        f"  {SWEEP.repeats}. posted: until the last put has returned, of {SWEEP.burst} for each "
        "queue pair, which fit into queues and rings. floor: the same stores\n"
        "  and fences by as many warps, each where nobody else writes and nobody reads (requests "
        "in the GPU's memory, triggers in the host's), without a wait\n"
        f"  or an atomic operation. completed: until the last is known to have arrived, of "
        f"{SWEEP.many} for each queue pair. of the line: bytes on the wire,\n"
        "  headers and signals included, over the modelled rate. Emulated NICs have their queues "
        "and doorbells in the GPU's memory: a card's doorbell crosses PCIe."
    )
