"""The sweep as a picture: speed-up against the ratio of multiply-accumulates, which is its limit."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.tables.methods import METHODS
from bench.tables.results import Row

_COLUMNS = 4
_MARKERS = "osD^vP"


def plot(rows: Sequence[Row], baseline: str) -> Figure:
    """A panel for each model and dtype: colours are methods, markers batch sizes, bars quartiles.

    Args:
        rows: measured ones.
        baseline: the method that speed-ups are over.
    """
    panels = list(dict.fromkeys((row["model"], row["dtype"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    colours = {name: f"C{i}" for i, name in enumerate(methods)}
    markers = {batch: _MARKERS[i % len(_MARKERS)] for i, batch in enumerate(batches)}
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns + 2.6, 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for (model, dtype), axis in zip(panels, axes, strict=False):  # panels first: no axis is taken for nothing
        mine = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        limit = max(row["macs_ratio"] for row in mine)
        axis.plot([1, limit], [1, limit], color="black", linestyle="--", linewidth=1)
        axis.axhline(1, color="grey", linewidth=0.6)
        for row in mine:
            low, high = row["speedup_quartiles"]
            bars = [[max(0, row["speedup"] - low)], [max(0, high - row["speedup"])]]
            style = {"color": colours[row["method"]], "marker": markers[row["batch"]], "markersize": 5}
            axis.errorbar(row["macs_ratio"], row["speedup"], yerr=bars, linestyle="", linewidth=1, **style)
        axis.set(
            title=f"{model}, {dtype}", xlabel="dense / remaining MACs", ylabel=f"speed-up over {METHODS[baseline]}"
        )
        axis.grid(alpha=0.3)
    for axis in list(axes):
        axis.set_axis_off()
    handles = [Line2D([], [], color="black", linestyle="--", label="arithmetic limit")]
    handles += [Line2D([], [], color=colours[m], marker="o", linestyle="", label=METHODS[m]) for m in methods]
    handles += [Line2D([], [], color="grey", marker=markers[b], linestyle="", label=f"batch {b}") for b in batches]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    return figure
