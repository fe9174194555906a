"""Pictures of the results."""

from matplotlib.figure import Figure

from .run_shape import STEPS, Result

_COLORS = {
    "epcomm": "tab:blue",
    "epcomm in place": "tab:cyan",
    "flat MPI_Alltoallv": "tab:orange",
    "gloo all_to_all_single": "tab:green",
    "floor": "tab:gray",
}


def plot(results: list[Result], path: str, title: str) -> None:
    """Draw the medians of every way and the floor, dispatch beside combine, and save the file."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplots(1, len(STEPS))
    for axis, step in zip(axes, STEPS, strict=True):
        ways = [result.alternatives(step) for result in results]
        bars = {name: [way[name].seconds * 1e3 for way in ways] for name in ways[0]}
        bars["floor"] = [result.floor_seconds(step) * 1e3 for result in results]
        width = 0.8 / len(bars)
        for i, (name, heights) in enumerate(bars.items()):
            places = [x + (i - (len(bars) - 1) / 2) * width for x in range(len(results))]
            axis.bar(places, heights, width, label=name, color=_COLORS[name])
        axis.set_title(step)
        axis.set_xticks(range(len(results)), [result.label for result in results], rotation=15)
        axis.set_ylabel("median time, ms")
        axis.set_yscale("log")
    handles, labels = axes[-1].get_legend_handles_labels()  # combine has every way
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(title, fontsize="small")
    figure.savefig(path)
