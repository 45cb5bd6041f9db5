"""Table 2: video-text retrieval with UMT or a dual encoder; 20% of the tokens leave after each of blocks 0, 1, 2."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.tables.comparison import add_choices, compare
from bench.tables.methods import ATTENTION, BASE, OURS
from bench.tables.options import add_arguments as add_shared
from bench.tables.options import add_data_arguments
from bench.tables.subjects import UMT, Paper, digits, dual_encoder, umt_encoder
from rs_compile.arguments import positive

BLOCKS, KEEP = (0, 1, 2), 0.8
SPEED = {
    "UMT-B": {BASE: (303.3, 32), ATTENTION: (156.4, 57), OURS: (156.4, 175)},
    "UMT-L": {BASE: (984.6, 12), ATTENTION: (478.5, 23), OURS: (478.5, 66)},
}
# R@1: base, attention, ours of UMT-B, then of UMT-L
RECALL = {
    "MSRVTT": (50.0, 47.6, 48.0, 58.7, 50.2, 56.5),
    "MSVD": (62.1, 60.3, 57.7, 70.3, 64.0, 67.9),
    "ActivityNet": (57.2, 54.2, 50.3, 65.6, 53.2, 62.9),
    "DiDeMo": (62.1, 57.7, 56.9, 70.8, 58.2, 67.3),
    "LSMDC": (32.7, 29.0, 30.0, 42.2, 34.4, 39.8),
    "SSV2-label": (64.0, 58.0, 59.1, 72.4, 60.6, 69.3),
    "SSV2-template": (74.6, 65.4, 69.0, 78.4, 67.5, 74.8),
}


def paper(name: str, dataset: str) -> Paper:
    """What table 2 prints of a model; accuracy is R@1 on the dataset, the mean of both directions."""
    at = 3 * list(UMT).index(name)
    return {
        method: {"gflops": gflops, "throughput": throughput, "accuracy": RECALL[dataset][at + i]}
        for i, (method, (gflops, throughput)) in enumerate(SPEED[name].items())
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_choices(parser, tuple(UMT))
    add_shared(parser, rounds=5)
    add_data_arguments(parser, videos=True)
    parser.add_argument(
        "--captions", type=Path, metavar="FILE", help='for --dual-encoder: {"video.mp4": ["a caption"]}'
    )
    parser.add_argument("--dual-encoder", metavar="FOLDER", help="a CLIP or X-CLIP model of transformers, as a row")
    parser.add_argument("--pretrained", action="store_true", help="--dual-encoder may name a model of the hub")
    parser.add_argument("--frames", type=positive, default=12, help="of a video, for --dual-encoder (default 12)")


def run(args: argparse.Namespace) -> int:
    dataset = args.dataset or "MSRVTT"
    subjects = [umt_encoder(name, BLOCKS, KEEP, paper(name, dataset), args.quick, qa=False) for name in UMT]
    extra = [digits(BLOCKS, KEEP)]
    if args.dual_encoder is not None:
        extra.append(dual_encoder(args.dual_encoder, BLOCKS, KEEP, args.pretrained))
    return compare(args, subjects, extra, "vid/s", f"paper's accuracy: R@1 on {dataset}.")
