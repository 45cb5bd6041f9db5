"""Table 5: ImageNet classification with DeiT; 20% of the tokens leave after each of blocks 0, 3, 6."""

from __future__ import annotations

import argparse

from bench.tables.comparison import add_choices, compare
from bench.tables.methods import ATTENTION, BASE, OURS
from bench.tables.options import add_arguments as add_shared
from bench.tables.options import add_data_arguments
from bench.tables.subjects import DEIT, Paper, deit, digits

BLOCKS, KEEP = (0, 3, 6), 0.8
DIGITS_BLOCKS = (0, 2, 4)  # of 6
# GFLOPs, images a second, top-1
PAPER = {
    "DeiT-T": {BASE: (1.3, 6725, 72.1), ATTENTION: (0.8, 10949, 65.5), OURS: (0.8, 13296, 68.3)},
    "DeiT-S": {BASE: (4.6, 3002, 79.8), ATTENTION: (3.0, 4844, 72.1), OURS: (3.0, 5948, 77.8)},
    "DeiT-B": {BASE: (17.6, 1037, 81.8), ATTENTION: (11.5, 2065, 76.9), OURS: (11.5, 2428, 79.6)},
}


def paper(name: str) -> Paper:
    """What table 5 prints of a model."""
    columns = ("gflops", "throughput", "accuracy")
    return {method: dict(zip(columns, figures, strict=True)) for method, figures in PAPER[name].items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_choices(parser, tuple(DEIT))
    add_shared(parser)
    add_data_arguments(parser, images=True)


def run(args: argparse.Namespace) -> int:
    subjects = [deit(name, BLOCKS, KEEP, paper(name), args.quick) for name in DEIT]
    return compare(args, subjects, [digits(DIGITS_BLOCKS, KEEP)], "img/s")
