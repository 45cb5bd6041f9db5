"""Figure 5: which operation's shift, by which metric; tokens leave after one block at a time."""

from __future__ import annotations

import argparse
from typing import get_args

from bench.tables.layer_plot import add_plot, run_figure
from bench.tables.one_layer import Curves, add_shared, deit_s, digits_vit, umt_b
from bench.tables.options import add_data_arguments
from passes.sites.score import Metric, Operation
from rs_compile import Shift

BLOCKS = (0, 2, 4, 6, 8)


def name(operation: str, metric: str) -> str:
    """Of the curve."""
    return f"{operation}, {metric}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser)
    parser.add_argument("--with-skip", action="store_true", help="compare x + F(x), not F(x), with x")
    add_plot(parser)
    add_data_arguments(parser, images=True, videos=True)


def run(args: argparse.Namespace) -> int:
    curves: Curves = {
        name(operation, metric): Shift(operation, metric, args.with_skip)
        for operation in get_args(Operation)
        for metric in get_args(Metric)
    }
    panels = {
        "operation, by L2": [name(operation, "l2") for operation in get_args(Operation)],
        "metric, of the MLP": [name("mlp", metric) for metric in get_args(Metric)],
    }
    return run_figure(args, [deit_s(40, BLOCKS), umt_b(1100, BLOCKS), digits_vit(80)], lambda _: curves, panels)
