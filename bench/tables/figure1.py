"""Figure 1: speed against accuracy, over keep ratios, ways to choose tokens, and model sizes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from bench.tables import table2, table5
from bench.tables.comparison import as_quick, untimed
from bench.tables.layer_plot import add_plot, check_out, save
from bench.tables.measure import fill, identity, measurable
from bench.tables.methods import (
    ATTENTION,
    BASE,
    COMPILED,
    METHODS,
    OURS,
    RANDOM,
    SDPA,
    STREAM,
    TOME,
    VID_TLDR,
    VID_TLDR_SHIFT,
    Method,
    dense,
)
from bench.tables.notes import give, notes
from bench.tables.one_layer import open_results
from bench.tables.options import add_arguments as add_shared
from bench.tables.options import add_data_arguments, chosen
from bench.tables.results import Row, accuracy_of, first_process, shown
from bench.tables.subjects import DEIT, UMT, Subject, deit, digits, umt_encoder
from rs_compile import Random, Schedule, Shift, ToMe, VidTLDR

KEEPS, QUICK_KEEPS = (0.9, 0.8, 0.7, 0.5, 0.3), (0.8, 0.3)

# A curve gives the schedule that leaves about this share of the tokens after each of these blocks.
Curve = Callable[[Subject, Mapping[int, float]], Schedule]
CURVES: dict[str, Curve] = {
    OURS: lambda _, keep: Schedule(keep),
    ATTENTION: lambda subject, keep: Schedule(keep, score=subject.attention),
    RANDOM: lambda _, keep: Schedule(keep, score=Random()),
    VID_TLDR: lambda _, keep: Schedule(merge=_shares(keep), by=VidTLDR()),
    VID_TLDR_SHIFT: lambda _, keep: Schedule(merge=_shares(keep), by=VidTLDR(Shift())),
    TOME: lambda _, keep: Schedule(merge=_shares(keep), by=ToMe()),
    STREAM: lambda _, keep: Schedule(merge=_shares(keep)),
}
HALF = 0.49  # of the tokens: matching pairs them, so that not more can merge at once


@dataclass(frozen=True)
class Drawn:
    """A model's rows: those of the dense model, and by curve those of its keep ratios."""

    subject: Subject
    dense: Sequence[Row]
    curves: Mapping[str, Sequence[Row]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ",".join(CURVES)
    parser.add_argument(
        "--curves", type=chosen(list(CURVES)), default=list(CURVES), metavar="NAME,...", help=f"some of {names}"
    )
    parser.add_argument("--keeps", type=_ratios, metavar="RATIO,...", help=f"keep ratios (default {KEEPS})")
    add_shared(parser)
    add_plot(parser)
    add_data_arguments(parser, images=True, videos=True)


def run(args: argparse.Namespace) -> int:
    check_out(args.out)
    setting, results = open_results(args)
    subjects = [
        *(deit(name, table5.BLOCKS, 1, {}, args.quick) for name in DEIT),
        *(umt_encoder(name, table2.BLOCKS, 1, {}, args.quick, qa=False) for name in UMT),
        digits(table5.DIGITS_BLOCKS, 1),
    ]
    keeps = args.keeps or (QUICK_KEEPS if args.quick else KEEPS)
    compiles = setting.backend != "eager" and "throughput" in setting.columns
    drawn = []
    for subject in (s for s in subjects if "accuracy" in measurable(s, args)):
        bases = [dense(name) for name in (BASE, SDPA, COMPILED) if name != COMPILED or compiles]
        curves = {
            name: [
                Method(
                    name,
                    CURVES[name](subject, dict.fromkeys(subject.keep, ratio)),
                    options={"explicit_attention": True} if name == ATTENTION and setting.eager_everywhere else {},
                    at={"keep": ratio},
                )
                for ratio in keeps
            ]
            for name in args.curves
        }
        methods = [*bases, *(method for curve in curves.values() for method in curve)]
        fill(results, subject, methods, setting.columns, setting, args)
        rows = {method.label: results.row(identity(subject, method)) for method in methods}
        drawn.append(
            Drawn(
                subject,
                [rows[m.label] for m in bases],
                {name: [rows[m.label] for m in curve] for name, curve in curves.items()},
            )
        )
    everything = [row for d in drawn for row in (*d.dense, *(r for curve in d.curves.values() for r in curve))]
    names = {d.subject.name: as_quick(d.subject).name for d in drawn}
    printed = [untimed(row) | {"model": names[row["model"]]} for row in everything] if args.quick else everything
    code = give(f"{_table(printed)}\n\n{_paper()}\n", notes(everything, setting), everything)
    if args.out is not None and first_process():
        save(plot(drawn), args.out)
    elif first_process():
        print("nothing is drawn without --out FILE.png")
    return code


def _shares(keep: Mapping[int, float]) -> dict[int, float]:
    """The shares that merge where `keep` stays, as far as merging can follow."""
    return {block: min(round(1 - ratio, 6), HALF) for block, ratio in keep.items()}


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        speed_up = ""
        if "speedup" in row:
            low, high = row["speedup_quartiles"]
            speed_up = f"{row['speedup']:.2f}x [{low:.2f}, {high:.2f}]"
        speed = f"{row['throughput']:.4g}" if "throughput" in row else ""
        keep = f"{row['keep']:g}" if "keep" in row else ""
        method = METHODS.get(row["method"], row["method"])
        lines.append([row["model"], method, keep, f"{row['gflops']:.4g}", speed, speed_up, shown(row)])
    heads = ["model", "method", "keep", "GFLOPs", "samples/s", "speed-up [quartiles]", "accuracy"]
    align = ["left", "left", "right", "right", "right", "left", "right"]
    filled = [i for i in range(len(heads)) if any(line[i] for line in lines)]
    return tabulate(
        [[line[i] for i in filled] for line in lines],
        [heads[i] for i in filled],
        disable_numparse=True,
        colalign=[align[i] for i in filled],
    )


def _paper() -> str:
    """The paper's points: its table 2, R@1 averaged over the seven datasets."""
    lines = []
    for name in UMT:
        for method in (BASE, ATTENTION, OURS):
            printed = [table2.paper(name, dataset)[method] for dataset in table2.RECALL]
            mean = fmean(figures["accuracy"] for figures in printed)
            speed, gflops = printed[0]["throughput"], printed[0]["gflops"]
            lines.append([name, METHODS[method], f"{gflops:.1f}", f"{speed:g}", f"{mean:.1f}"])
    heads = ["the paper's points", "", "GFLOPs", "vid/s", "mean R@1"]
    return tabulate(lines, heads, disable_numparse=True, colalign=["left", "left", "right", "right", "right"])


def plot(drawn: Sequence[Drawn]) -> Figure:
    """Accuracy against throughput, or against GFLOPs where nobody measured that; the dense models are red."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    timed = all("throughput" in row for d in drawn for row in d.dense)
    x = "throughput" if timed else "gflops"
    for d, marker in zip(drawn, "osd^v", strict=False):
        bases = [(row[x], accuracy_of(d.dense[0])) for row in d.dense]  # which is that of all of them
        lines = {f"dense ({', '.join(row['method'] for row in d.dense)})" if timed else "dense": ("red", "--", bases)}
        for i, (name, curve) in enumerate(d.curves.items()):
            points = [(row[x], accuracy_of(row)) for row in curve]
            lines[METHODS.get(name, name)] = (f"C{i}", "-", points)
        for name, (colour, style, points) in lines.items():
            known = np.array([point for point in points if point[1] is not None]).reshape(-1, 2)
            axis.plot(*known.T, color=colour, linestyle=style, marker=marker, label=f"{d.subject.name}, {name}")
    axis.set(xlabel="samples/s" if timed else "GFLOPs", ylabel="accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure


def _ratios(text: str) -> list[float]:
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        ratios = []
    if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        raise argparse.ArgumentTypeError(f"{text!r} are no keep ratios; write numbers above 0 and at most 1, 0.9,0.8")
    return ratios
