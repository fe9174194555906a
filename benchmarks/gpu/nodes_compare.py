"""Modelled networks side by side, by the size of a message: posted by kernels, and by proxies."""

from collections.abc import Sequence

from .figures import Figure
from .network import is_modelled

#: What a figure has more of, by name.
_SHARE, _LATE, _BYTES = "data % of line", "late copies %", "message KB"
#: Percent of messages that were copied too late, above which the copier was the limit.
_MOST_LATE = 1.0


def compare(figures: Sequence[Figure]) -> list[str]:
    """A Markdown table of one case's figures; nothing where there are not two modelled networks.

    A line for each call and size of message, a column for each fabric with its options, and behind
    them the time of each over that of the first. Messages that were copied later than the model
    says are named where there are too many.
    """
    modelled = [f for f in figures if is_modelled(f.fabric) and _BYTES in f.more]
    fabrics = list(dict.fromkeys(f.fabric for f in modelled))
    if len(fabrics) < 2:
        return []
    first, *others = fabrics
    heads = [f"{name}: us (of the line)" for name in fabrics]
    heads += [f"{name} over {first}" for name in others]
    lines = [
        "",
        "Modelled network, by the size of a message:",
        "",
        f"| nodes x ranks x SMs, call | KB | {' | '.join(heads)} |",
        f"|{'---|' * (len(heads) + 2)}",
    ]
    cells = {(_place(f), f.more[_BYTES], f.fabric): f for f in modelled}
    for place, size in dict.fromkeys((where, size) for where, size, _ in cells):
        found = [cells.get((place, size, fabric)) for fabric in fabrics]
        texts = [_cell(figure) for figure in found]
        texts += [_ratio(figure, found[0]) for figure in found[1:]]
        lines.append(f"| {place} | {size:.1f} | {' | '.join(texts)} |")
    return lines


def _place(figure: Figure) -> str:
    ranks = figure.ranks // figure.nodes
    return f"{figure.nodes} x {ranks} x {figure.sms}, {figure.name}"


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    share, late = figure.more.get(_SHARE), figure.more.get(_LATE, 0.0)
    says = [] if share is None else [f"{share:.0f} %"]
    if late > _MOST_LATE:
        says.append(f"late {late:.0f} %")
    return f"{figure.seconds * 1e6:.0f}" + (f" ({', '.join(says)})" if says else "")


def _ratio(figure: Figure | None, first: Figure | None) -> str:
    return "" if figure is None or first is None else f"{figure.seconds / first.seconds:.2f}"
