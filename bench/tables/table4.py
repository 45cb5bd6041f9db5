"""Table 4: video question answering with UMT; 10% of the tokens leave after each of blocks 0, 1, 2."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.tables.comparison import add_choices, compare
from bench.tables.methods import ATTENTION, BASE, OURS
from bench.tables.options import add_arguments as add_shared
from bench.tables.options import add_data_arguments
from bench.tables.subjects import UMT, Paper, digits, umt_encoder
from rs_compile.arguments import positive

BLOCKS, KEEP = (0, 1, 2), 0.9
DATASETS = ("MSRVTT-QA", "MSVD-QA")
# GFLOPs, videos a second, accuracy on the two datasets
PAPER = {
    "UMT-B": {BASE: (303.3, 32, 44.9, 48.1), ATTENTION: (217.7, 39, 44.8, 46.5), OURS: (217.7, 128, 44.6, 47.0)},
    "UMT-L": {BASE: (984.6, 12, 49.5, 55.2), ATTENTION: (690.5, 15, 49.5, 54.2), OURS: (690.5, 46, 49.0, 54.9)},
}


def paper(name: str, dataset: str) -> Paper:
    """What table 4 prints of a model; accuracy is that on the dataset."""
    return {
        method: {"gflops": gflops, "throughput": throughput, "accuracy": answered[DATASETS.index(dataset)]}
        for method, (gflops, throughput, *answered) in PAPER[name].items()
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_choices(parser, tuple(UMT))
    add_shared(parser, rounds=5)
    add_data_arguments(parser, videos=True, datasets=DATASETS)
    parser.add_argument("--answers", type=Path, metavar="FILE", help='all candidate answers, ["yes", "no", ...]')
    parser.add_argument(
        "--candidates", type=positive, default=128, metavar="N", help="ranked in the second stage (default 128)"
    )


def run(args: argparse.Namespace) -> int:
    dataset = args.dataset or DATASETS[0]
    subjects = [umt_encoder(name, BLOCKS, KEEP, paper(name, dataset), args.quick, qa=True) for name in UMT]
    return compare(args, subjects, [digits(BLOCKS, KEEP)], "vid/s", f"paper's accuracy: on {dataset}.")
