"""The command line, and the shape of one measurement that it describes.

Run as a program this prints how many ranks the same arguments need, for the launcher. It imports
nothing heavy for that reason.
"""

import argparse
from dataclasses import dataclass, replace

DISPATCH_FORMATS = ("bf16", "fp8", "fp8_ue8m0")
COMBINE_FORMATS = ("bf16", "logfmt8", "logfmt10")
SWEEPS = ("size", "ranks", "nodes", "formats", "hidden", "topk")


@dataclass(frozen=True)
class Shape:
    """What one measurement exchanges, and between how many.

    Attributes:
        ranks: R, ranks taking part.
        nodes: N, equal groups of neighbouring ranks.
        tokens: T of every rank.
        hidden: H.
        experts: E of all ranks together.
        topk: K.
        groups: groups of experts of the gate.
        topk_groups: groups a token may use.
        routing: spec of :func:`epcomm.routing.make_routing`.
        dispatch_format: of dispatched rows.
        combine_format: of combined rows between nodes.
        layout: of received rows, ``"rank"`` or ``"expert"``.
        seed: of routing and rows.

    """

    ranks: int
    nodes: int
    tokens: int
    hidden: int
    experts: int
    topk: int
    groups: int
    topk_groups: int
    routing: str
    dispatch_format: str
    combine_format: str
    layout: str
    seed: int

    @property
    def ranks_per_node(self) -> int:
        """L."""
        return self.ranks // self.nodes

    @property
    def experts_per_rank(self) -> int:
        """E / R."""
        return self.experts // self.ranks


@dataclass(frozen=True)
class Options:
    """The whole run.

    Attributes:
        shapes: what to measure, in order.
        labels: what distinguishes each shape from the others, for tables and plots.
        repeats: of each shape.
        sweep: one of SWEEPS, or None.
        json: file for all numbers, or None.
        plot: picture file, or None.

    """

    shapes: list[Shape]
    labels: list[str]
    repeats: int
    sweep: str | None
    json: str | None
    plot: str | None

    @property
    def ranks(self) -> int:
        """Ranks to launch."""
        return max(shape.ranks for shape in self.shapes)


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/bench.sh",
        description="Time epcomm's dispatch and combine against a flat MPI_Alltoallv and gloo.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--ranks", type=positive, default=8, help="ranks to launch")
    add("--nodes", type=positive, default=2, help="nodes the ranks form, real or virtual")
    add("--tokens", type=positive, nargs="+", default=[4096, 128], help="tokens per rank")
    add("--hidden", type=positive, default=7168)
    add("--experts", type=positive, default=256, help="experts of all ranks together")
    add("--topk", type=positive, default=8, help="experts per token")
    add("--groups", type=positive, default=8, help="groups of experts of the gate")
    add("--topk-groups", type=positive, default=4, help="groups a token may use")
    add(
        "--routing",
        default="profile:prefill_in4096",
        help="uniform, gate, skewed, one-expert, profile:NAME or FILE, trace:FILE",
    )
    add("--dispatch-format", choices=DISPATCH_FORMATS, default="fp8")
    add("--combine-format", choices=COMBINE_FORMATS, default="bf16", help="between nodes")
    add("--layout", choices=("rank", "expert"), default="rank", help="of epcomm's received rows")
    add("--repeats", type=positive, default=5, help="timed calls of each kind")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE", help="write all numbers")
    add("--plot", metavar="FILE", help="draw them (.png or .svg)")
    add("--sweep", choices=SWEEPS, help="vary one thing, from the first of --tokens")
    return parser


def _swept(base: Shape, sweep: str) -> tuple[list[Shape], list[str]]:
    """Make the shapes of a sweep, leaving out values that do not fit the rest of the shape."""
    if sweep == "formats":
        pairs = [("bf16", "bf16"), ("fp8", "bf16"), ("fp8_ue8m0", "bf16")]
        pairs += [("fp8", "logfmt10"), ("fp8", "logfmt8")]
        shapes = [replace(base, dispatch_format=d, combine_format=c) for d, c in pairs]
        return shapes, [f"{d} / {c}" for d, c in pairs]
    if sweep == "ranks":
        sizes = sorted({2**i for i in range(1, 11) if 2**i < base.ranks} | {base.ranks})
        shapes = [
            replace(base, ranks=size, nodes=base.nodes if size % base.nodes == 0 else 1)
            for size in sizes
            if base.experts % size == 0
        ]
        return shapes, [f"ranks {shape.ranks}" for shape in shapes]
    if sweep == "nodes":
        counts = [n for n in range(1, base.ranks + 1) if base.ranks % n == 0]
        return [replace(base, nodes=n) for n in counts], [f"nodes {n}" for n in counts]
    if sweep == "size":
        sizes = [16, 64, 256, 1024, 4096]
        return [replace(base, tokens=t) for t in sizes], [f"tokens {t}" for t in sizes]
    if sweep == "hidden":
        sizes = [1024, 2048, 4096, 7168]
        return [replace(base, hidden=h) for h in sizes], [f"hidden {h}" for h in sizes]
    assert sweep == "topk"
    counts = [k for k in (1, 2, 4, 8) if k <= base.experts]
    return [replace(base, topk=k) for k in counts], [f"top-{k}" for k in counts]


def parse(arguments: list[str] | None = None) -> Options:
    """Read the command line; ends the program with a message when it makes no sense."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.ranks % given.nodes:
        parser.error(f"--ranks {given.ranks} does not divide into --nodes {given.nodes}")
    if given.experts % given.ranks:
        parser.error(f"--experts {given.experts} does not divide among --ranks {given.ranks}")
    if given.plot and not given.plot.endswith((".png", ".svg")):
        parser.error(f"--plot: expected a .png or .svg file, got {given.plot}")
    fields = {name: getattr(given, name) for name in Shape.__dataclass_fields__ if name != "tokens"}
    base = Shape(tokens=given.tokens[0], **fields)
    if given.sweep:
        shapes, labels = _swept(base, given.sweep)
    else:
        shapes = [replace(base, tokens=tokens) for tokens in given.tokens]
        labels = [f"tokens {tokens}" for tokens in given.tokens]
    return Options(shapes, labels, given.repeats, given.sweep, given.json, given.plot)


if __name__ == "__main__":
    print(parse().ranks)
