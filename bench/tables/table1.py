"""Table 1: what fused attention alone gives, and what compiling gives on top."""

from __future__ import annotations

import argparse

from bench.tables.comparison import add_choices, compare
from bench.tables.methods import BASE, COMPILED, SDPA
from bench.tables.options import add_arguments as add_shared
from bench.tables.options import add_data_arguments
from bench.tables.subjects import Paper, deit, digits, umt_encoder

DEIT_S: Paper = {BASE: {"accuracy": 79.8, "throughput": 2308}, SDPA: {"accuracy": 79.8, "throughput": 3552}}
UMT_B: Paper = {BASE: {"accuracy": 50.0, "throughput": 32}, SDPA: {"throughput": 85}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_choices(parser, ("DeiT-S", "UMT-B"), (BASE, SDPA, COMPILED))
    add_shared(parser)
    add_data_arguments(parser, images=True, videos=True)


def run(args: argparse.Namespace) -> int:
    subjects = [
        deit("DeiT-S", (), 1, DEIT_S, args.quick),
        umt_encoder("UMT-B", (), 1, UMT_B, args.quick, qa=False),
    ]
    return compare(args, subjects, [digits((), 1)], "samples/s")
