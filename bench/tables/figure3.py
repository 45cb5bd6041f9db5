"""Figure 3: attention scores against representation shift, tokens leaving after one block at a time."""

from __future__ import annotations

import argparse

from bench.tables.layer_plot import add_plot, run_figure
from bench.tables.one_layer import Curves, Study, add_shared, deit_s, digits_vit, umt_b
from bench.tables.options import add_data_arguments
from rs_compile import Random, Shift

BLOCKS = (0, 2, 4, 6, 8)
ATTENTION, SHIFT, MLP_SHIFT, RANDOM = "attention score", "attention shift", "MLP shift", "random"


def curves(study: Study) -> Curves:
    """The paper's two, our default score, and chance."""
    return {
        ATTENTION: study.subject.attention,
        SHIFT: Shift("attention"),
        MLP_SHIFT: Shift(),
        RANDOM: Random(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser)
    add_plot(parser)
    add_data_arguments(parser, images=True, videos=True)


def run(args: argparse.Namespace) -> int:
    studies = [deit_s(40, BLOCKS), umt_b(1100, BLOCKS), digits_vit(80)]
    return run_figure(args, studies, curves, {"attention score or shift": (ATTENTION, SHIFT, MLP_SHIFT, RANDOM)})
