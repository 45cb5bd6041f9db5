"""Accuracy by block, a line for each method: the table and the plot of figures 3 and 5."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from tabulate import tabulate

from bench.tables.notes import give, notes
from bench.tables.one_layer import Curves, Measured, Study, gflops_line, measure, open_results, with_data
from bench.tables.results import UsageError, accuracy_of, first_process, shown

STYLES = (("o", "C0"), ("s", "C1"), ("d", "C2"), ("^", "C4"), ("v", "C5"))  # red is the dense model's
Panels = Mapping[str, Sequence[str]]  # title -> methods


def add_plot(parser: argparse.ArgumentParser) -> None:
    """The option of a plot."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PNG",
        help="draw it into this file; a .svg or .pdf will do too. Without it there is the table alone",
    )


def run_figure(
    args: argparse.Namespace, studies: Sequence[Study], curves: Callable[[Study], Curves], panels: Panels
) -> int:
    """Measures the studies that there is data for; prints their tables, draws a row of panels for each.

    Args:
        args: of `one_layer.add_shared`, `add_plot` and the data's options.
        studies: the paper's, and the digits.
        curves: of a study.
        panels: which methods are drawn together; the table has them all.

    Returns:
        The exit code.
    """
    check_out(args.out)
    setting, results = open_results(args)
    code, done = 0, []
    for study in with_data(studies, args):
        measured = measure(args, study, curves(study), setting, results)
        left = f"{study.leave} of {study.tokens} tokens leave after one block."
        code |= give(table(measured), [left, *notes(measured.everything(), setting)], measured.everything())
        done.append(measured)
    if args.out is not None and first_process():
        save(plot(done, panels), args.out)
    elif first_process():
        print("nothing is drawn without --out FILE.png")
    return code


def table(measured: Measured) -> str:
    """Accuracy by method and block, with the GFLOPs of each block."""
    first = next(iter(measured.rows.values()))
    rows = [["GFLOPs", *gflops_line(measured)]]
    if "accuracy" in measured.base:
        rows += [[name, *map(shown, of_block.values())] for name, of_block in measured.rows.items()]
    dense = f"{measured.study.subject.name}, dense: {measured.base['gflops']:.3f} GFLOPs"
    if shown(measured.base):
        dense += f", accuracy {shown(measured.base)}"
    heads = ["", *(f"block {block}" for block in first)]
    body = tabulate(rows, heads, disable_numparse=True, colalign=["left"] + ["right"] * len(first))
    return f"{dense}\n{body}"


def plot(done: Sequence[Measured], panels: Panels) -> Figure:
    """A row for each model, a panel for each group of methods; the dense model is the red line."""
    figure = Figure(figsize=(5 * len(panels), 3.6 * len(done)), layout="constrained")
    axes = figure.subplots(len(done), len(panels), squeeze=False, sharey="row")
    for row, measured in zip(axes, done, strict=True):
        for axis, (title, methods) in zip(row, panels.items(), strict=True):
            for method, (marker, colour) in zip(methods, STYLES, strict=False):
                points = {b: y for b, row in measured.rows[method].items() if (y := accuracy_of(row)) is not None}
                axis.plot(list(points), list(points.values()), marker=marker, color=colour, label=method)
            if (dense := accuracy_of(measured.base)) is not None:
                axis.axhline(dense, color="red", linestyle="--", label="dense")
            axis.set(title=f"{measured.study.subject.name}: {title}", xlabel="block", ylabel="accuracy, %")
            axis.set_xticks(list(next(iter(measured.rows.values()))))
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
    return figure


def check_out(out: Path | None) -> None:
    """Raises UsageError where no picture can be written there; before minutes of work."""
    if out is None:
        return
    kinds = Figure().canvas.get_supported_filetypes()
    if out.suffix.lstrip(".").lower() not in kinds:
        raise UsageError(f"--out {out}: write a name that ends in .png, .svg or .pdf")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: no file can be written there; give one in a directory that exists")


def save(figure: Figure, out: Path) -> None:
    """Writes the picture."""
    figure.savefig(out, dpi=150)
