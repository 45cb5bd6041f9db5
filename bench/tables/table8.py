"""Table 8: the half of the patches with the highest scores stays after one layer, or the half with the lowest."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from statistics import fmean

from tabulate import tabulate

from bench.tables.comparison import as_quick
from bench.tables.notes import give, notes
from bench.tables.one_layer import (
    Measured,
    add_shared,
    deit_s,
    digits_vit,
    gflops_line,
    measure,
    open_results,
    with_data,
)
from bench.tables.options import add_data_arguments
from bench.tables.results import accuracy_of, shown
from rs_compile import Lowest, Shift

TOP, BOTTOM = "top half", "bottom half"
CURVES = {TOP: Shift(), BOTTOM: Lowest()}
BLOCKS = (0, 2, 4, 6, 8, 10)  # the paper's L1, L3, ..., L11
PAPER = {
    TOP: dict(zip(BLOCKS, (76.3, 76.1, 78.5, 79.4, 78.5, 78.9), strict=True)),
    BOTTOM: dict(zip(BLOCKS, (51.4, 51.9, 47.0, 49.6, 56.1, 54.1), strict=True)),
}
PAPER_MEAN = {TOP: 78.0, BOTTOM: 51.7}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser)
    add_data_arguments(parser, images=True)


def run(args: argparse.Namespace) -> int:
    setting, results = open_results(args)
    code = 0
    for study in with_data([deit_s(98, BLOCKS), digits_vit(50)], args):
        measured = measure(args, study, CURVES, setting, results)
        lines = [
            f"L1 is block 0. Dense: {measured.base['gflops']:.3f} GFLOPs"
            + (f", accuracy {shown(measured.base)}." if shown(measured.base) else "."),
            *notes(measured.everything(), setting, "paper's accuracy: DeiT-S on ImageNet, dense 79.8."),
        ]
        code |= give(_text(measured, args.quick), lines, measured.everything())
    return code


def _text(measured: Measured, quick: bool) -> str:
    subject = measured.study.subject
    name = as_quick(subject).name if quick else subject.name
    columns = sorted({*measured.rows[TOP], *BLOCKS})

    def line(who: str, kept: str, texts: Mapping[int, str], mean: str = "") -> list[str]:
        return [who, kept, *(texts.get(block, "") for block in columns), mean]

    lines = [line(name, "GFLOPs", dict(zip(measured.rows[TOP], gflops_line(measured), strict=True)))]
    for kept, of_block in measured.rows.items():
        known = [value for row in of_block.values() if (value := accuracy_of(row)) is not None]
        mean = f"{fmean(known):.1f}" if known else ""
        lines.append(line(name, kept, {block: shown(row) for block, row in of_block.items()}, mean))
    for kept, printed in PAPER.items():
        lines.append(line("paper", kept, {b: f"{v:.1f}" for b, v in printed.items()}, f"{PAPER_MEAN[kept]:.1f}"))
    heads = ["", "kept", *(f"L{block + 1}" for block in columns), "mean"]
    return tabulate(lines, heads, disable_numparse=True, colalign=["left", "left"] + ["right"] * (len(columns) + 1))
