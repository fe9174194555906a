"""Pictures of the results."""

import matplotlib as mpl

from .run_shape import STEPS, Result

mpl.use("agg")  # needs no display

from matplotlib import pyplot as plt


def plot(results: list[Result], path: str, title: str) -> None:
    """Draw the medians of every case and the floor, dispatch beside combine, and save the file."""
    figure, axes = plt.subplots(1, len(STEPS), figsize=(11, 4.5), layout="constrained")
    names = list(dict.fromkeys(t.case for t in results[0].timings if t.case != "copy"))
    width = 0.8 / (len(names) + 1)
    for axis, step in zip(axes, STEPS, strict=True):
        bars = {name: [r.timing(name, step).seconds * 1e3 for r in results] for name in names}
        bars["floor"] = [r.floor_seconds(step) * 1e3 for r in results]
        for i, (name, heights) in enumerate(bars.items()):
            places = [x + (i - (len(bars) - 1) / 2) * width for x in range(len(results))]
            axis.bar(places, heights, width, label=name)
        axis.set_title(step)
        axis.set_xticks(range(len(results)), [r.label for r in results], rotation=20, ha="right")
        axis.set_ylabel("median time, ms")
        axis.set_yscale("log")
    axes[0].legend()
    figure.suptitle(title, fontsize="small")
    figure.savefig(path)
    plt.close(figure)
