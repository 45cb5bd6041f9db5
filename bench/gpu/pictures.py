"""The plots of the report: speed beside the arithmetic limit and the paper, launches by block, attention by length."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.gpu.document import Table
from bench.gpu.size_bias import CHANNELS, MASK
from bench.gpu.throughput import ORDER, printed_speed_up
from bench.tables.methods import BASE, COMPILED, METHODS
from bench.tables.results import Row
from bench.throughput.picture import plot

KINDS = {"generated": "C0", "product": "C7", "attention": "C1", "other": "C3"}


def pictures(rows: Mapping[str, Sequence[Row]]) -> list[Table]:
    """Those that there are rows for.

    Args:
        rows: by module.
    """
    speed = [row for row in rows.get("bench.gpu.throughput", ()) if "throughput" in row]
    counted = [row for row in rows.get("bench.gpu.launches", ()) if "parts" in row]
    biased = [row for row in rows.get("bench.gpu.size_bias", ()) if "milliseconds" in row]
    found = []
    if any(row["macs_ratio"] > 1 for row in speed):
        note = "Over torch.compile(model), against the ratio of multiply-accumulates, which is the limit (dashed)."
        found.append(_section("Plot: throughput beside the MAC limit", plot(speed, COMPILED), note))
        note = "Over eager attention, as papers count; bars are quartiles, black marks the paper's figures."
        found.append(_section("Plot: speed-up over eager attention", over_eager(speed), note))
    if counted:
        note = "From one attention to the next: a bar is the end of a block, the site behind it, the next block's "
        note += "queries, keys and values, and its attention; the last bar is what follows the last attention."
        found.append(_section("Plot: launches by block", launches(counted), note))
    if biased:
        found.append(_section("Plot: size bias by length", size_bias(biased), "Less is faster."))
    return found


def _section(title: str, figure: Figure, note: str) -> Table:
    return Table(title, (), [], notes=[note], svg=[svg(figure, title)])


def svg(figure: Figure, title: str) -> str:
    """The figure as an element of a page; letters stay text."""
    file = io.StringIO()
    # ids by what is drawn: the same rows give the same page; and by title: no two plots of a page share one
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    read = set(re.findall(r"#([\w-]+)[\")]", text))
    # every figure has the same names of its parts
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in read else "", text)
    return text[text.index("<svg") :]


def over_eager(rows: Sequence[Row]) -> Figure:
    """A panel for each model and dtype, a bar for each way."""
    by_panel: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_panel.setdefault((row["model"], row["dtype"]), []).append(row)
    panels = list(by_panel.items())
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for ((model, dtype), of), axis in zip(panels, axes, strict=False):
        of = sorted((r for r in of if r["method"] != BASE), key=lambda r: ORDER.index(r["method"]), reverse=True)
        heights = [row["over_eager"] for row in of]
        low = [max(0, row["over_eager"] - row["over_eager_quartiles"][0]) for row in of]
        high = [max(0, row["over_eager_quartiles"][1] - row["over_eager"]) for row in of]
        axis.barh([METHODS[row["method"]] for row in of], heights, xerr=[low, high], color="C0", height=0.6)
        for at, row in enumerate(of):
            if paper := printed_speed_up(model, row["method"]):
                axis.plot(paper, at, marker="|", color="black", markersize=16, markeredgewidth=2.5)
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.set(
            title=f"{model}, {dtype}, batch {of[0]['batch'] if of else ''}", xlabel="speed-up over eager attention"
        )
        axis.tick_params(labelsize="small")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def launches(rows: Sequence[Row]) -> Figure:
    """A panel for each case, a stacked bar for each part between two attentions."""
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for row, axis in zip(rows, axes, strict=False):
        parts = row["parts"]
        below = [0] * len(parts)
        for kind, colour in KINDS.items():
            heights = [part.get(kind, 0) for part in parts]
            axis.bar(range(len(parts)), heights, bottom=below, color=colour, label=kind)
            below = [a + b for a, b in zip(below, heights, strict=True)]
        for at, total in enumerate(below):
            axis.text(at, total, str(total), ha="center", va="bottom", fontsize="small")
        names = [f"to {i}" for i in range(len(parts) - 1)] + ["end"] if len(parts) > 1 else ["all"]
        axis.set(title=row["case"], ylim=(0, 1.15 * max(*below, 1)), ylabel="launches" if row["compiled"] else "ops")
        axis.set_xticks(range(len(parts)), names)
    for axis in axes[len(rows) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return figure


def size_bias(rows: Sequence[Row]) -> Figure:
    """Time of an attention by number of tokens, channels over mask."""
    rows = sorted(rows, key=lambda row: row["tokens"])
    figure = Figure(figsize=(5.6, 3), layout="constrained")
    axis = figure.subplots()
    tokens = [row["tokens"] for row in rows]
    ratios = [1 / row["ratio"]["median"] for row in rows]
    low = [max(0, r - 1 / row["ratio"]["quartile_high"]) for r, row in zip(ratios, rows, strict=True)]
    high = [max(0, 1 / row["ratio"]["quartile_low"] - r) for r, row in zip(ratios, rows, strict=True)]
    axis.errorbar(tokens, ratios, yerr=[low, high], marker="o")
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(xlabel="tokens", ylabel="seconds, channels / mask", title=f"{CHANNELS} over {MASK}")
    axis.grid(alpha=0.3)
    return figure
