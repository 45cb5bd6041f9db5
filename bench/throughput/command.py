"""Speed of models, batch sizes and dtypes: eager, compiled, pruned and merged, beside the arithmetic limit.

All ways to run a model are interleaved. A speed-up is over torch.compile(model), and the limit is the ratio of
multiply-accumulates; `of limit` is the one over the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tabulate import tabulate

from bench.tables.layer_plot import check_out, save
from bench.tables.methods import COMPILED, METHODS, OURS
from bench.tables.options import chosen, usable
from bench.tables.results import Results, Row, environment
from bench.throughput.networks import NETWORKS
from bench.throughput.picture import plot
from bench.throughput.sweep import NAMES, Cell, measure, methods_of
from rs_compile.arguments import DTYPES as FLOATS
from rs_compile.arguments import positive

KEEPS = (0.8, 0.9, 0.7)
BATCHES, QUICK_BATCH = (16,), 2
ROUNDS, QUICK_ROUNDS = 9, 2
# asked of ours over torch.compile(model), as a share of the MAC ratio, on two CPU threads
ASKED = {(16, m): 0.95 for m in ("DeiT-T", "DeiT-S", "DeiT-B", "CLIP ViT-B/16", "UMT-B")}
ASKED |= {(8, m): 0.93 for m in ("CLIP ViT-B/16", "DINOv3-S", "BEiT-B", "BERT-base")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the sweep."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, saved as they are measured; a rerun goes on")
    parser.add_argument("--out", type=Path, metavar="PNG", help="the plot; a .svg or .pdf will do too")
    parser.add_argument("--quick", action="store_true", help="small stand-ins, uncompiled: does every row run?")
    for option, known in (("--models", list(NETWORKS)), ("--methods", list(NAMES)), ("--dtypes", list(FLOATS))):
        default = ["float32"] if option == "--dtypes" else known
        text = f"some of {', '.join(known)}" + ("" if default == known else f" (default {default[0]})")
        parser.add_argument(option, type=chosen(known), default=default, metavar="NAME,...", help=text)
    parser.add_argument(
        "--batches", type=_each(positive), metavar="N,...", help="samples of a call (default 16; quick: 2)"
    )
    parser.add_argument(
        "--keeps",
        type=_each(_ratio),
        default=list(KEEPS),
        metavar="RATIO,...",
        help="keep ratios of ours after three blocks; the baselines and merging take the first (default 0.8,0.9,0.7)",
    )
    parser.add_argument(
        "--multiples",
        type=_each(positive),
        default=[1],
        metavar="N,...",
        help="ours at each ratio with what stays rounded up to a multiple of N (default 1)",
    )
    parser.add_argument("--rounds", type=positive, help=f"of timing, all methods in each (default {ROUNDS})")
    parser.add_argument("--threads", type=positive, help="CPU threads, torch's own choice if not given")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 (default cpu)")
    parser.add_argument("--backend", choices=("inductor", "eager"), help="default inductor; with --quick eager")


def run(args: argparse.Namespace) -> int:
    """Measures what the journal lacks, prints the table and draws it; returns the exit code."""
    check_out(args.out)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = usable(args.device)
    backend = args.backend or ("eager" if args.quick else "inductor")
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    settings = {"backend": backend, "rounds": rounds, "device": str(device), "quick": args.quick}
    results = Results(args.json, environment("throughput", settings))
    cells = [
        Cell(NETWORKS[name], batch, dtype, methods_of(NETWORKS[name], batch, args.methods, args.keeps, args.multiples))
        for name in args.models
        for dtype in args.dtypes
        for batch in args.batches or ([QUICK_BATCH] if args.quick else BATCHES)
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    lacking = [cell for cell in cells if not cell.done(results)]
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("", total=sum(cell.steps(rounds) for cell in lacking))
        for cell in lacking:
            where = f"{cell.network.name}, batch {cell.batch}, {cell.dtype}"

            def say(text: str, where: str = where) -> None:
                progress.update(task, advance=1, description=f"{where}: {text}")

            measure(cell, results, backend=backend, rounds=rounds, device=device, quick=args.quick, say=say)
    rows = [results.row(cell.identity(method)) for cell in cells for method in cell.methods]
    print(table(rows))
    print("\n".join(notes(cells, settings, args.quick)))
    if args.out is not None:
        save(plot(rows, COMPILED), args.out)
    return 0


def table(rows: Sequence[Row]) -> str:
    """A line for each row, the share of the limit last, beside what is asked of it."""
    lines = []
    for row in rows:
        low, high = row["speedup_quartiles"]
        saves = row["macs_ratio"] > 1
        ours = (
            row["method"] == OURS and row["keep"] == KEEPS[0] and row["dtype"] == "float32" and "multiple_of" not in row
        )
        asked = ASKED.get((row["batch"], row["model"])) if ours else None
        lines.append(
            [
                row["model"],
                row["batch"],
                row["dtype"],
                METHODS[row["method"]]
                + (f", keep {row['keep']:g}" if "keep" in row else "")
                + (f", by {row['multiple_of']}s" if "multiple_of" in row else ""),
                f"{row['macs'] / 1e9:.3g}",
                f"{row['throughput']:.4g}",
                f"{row['speedup']:.2f}x [{low:.2f}, {high:.2f}]",
                f"{row['macs_ratio']:.2f}" if saves else "",
                f"{row['of_limit']:.2f}" if saves else "",
                f"{asked:.2f}" if asked else "",
            ]
        )
    heads = [
        "model",
        "batch",
        "dtype",
        "method",
        "GMACs",
        "samples/s",
        "speed-up [quartiles]",
        "limit",
        "of limit",
        "asked",
    ]
    align = ("left", "right", "left", "left", "right", "right", "left", "right", "right", "right")
    return tabulate(lines, heads, disable_numparse=True, colalign=align)


def notes(cells: Sequence[Cell], settings: dict[str, object], quick: bool) -> list[str]:
    """What a reader must know about the numbers."""
    where = environment("throughput", settings)
    lines = [
        "speed-up over torch.compile(model); limit: the ratio of multiply-accumulates; medians of "
        f"{settings['rounds']} interleaved rounds; {where['processor']}, {settings['device']}, "
        f"{where['threads']} threads, torch {where['torch']}, backend {settings['backend']}."
    ]
    if quick:
        lines.insert(0, "quick: small stand-ins for the models named, uncompiled, so that the numbers mean nothing.")
    if left := {c.network.name for c in cells if c.network.written_out is not None and c.batch > c.network.written_out}:
        lines.append(f"attention is not written out where its map does not fit: {', '.join(sorted(left))}.")
    return lines


def _each(read: Callable[[str], float]) -> Callable[[str], list[float]]:
    def numbers(text: str) -> list[float]:
        return list(dict.fromkeys(read(part.strip()) for part in text.split(",")))

    return numbers


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0
    if not 0 < ratio < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no keep ratio between 0 and 1")
    return ratio
