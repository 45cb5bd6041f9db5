"""Table 3: vid-TLDR's merging in UMT, by its attention entropy and by representation shift with flash attention."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from bench.tables.comparison import as_quick, untimed
from bench.tables.measure import fill, identity, measurable, results_of
from bench.tables.methods import (
    BASE,
    COMPILED,
    METHODS,
    SDPA,
    STREAM,
    TOME,
    VID_TLDR,
    VID_TLDR_SHIFT,
    WARD,
    dense,
    merging,
)
from bench.tables.notes import give, notes
from bench.tables.options import Setting, add_data_arguments, check_umt, chosen
from bench.tables.options import add_arguments as add_shared
from bench.tables.results import Row
from bench.tables.subjects import DIGITS, UMT, Paper, Subject, digits, umt_encoder

# tokens that merge in blocks 0, 1, ...: vid-TLDR's published settings, for UMT-B and UMT-L
COUNTS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "MSRVTT": ((600, 200, 100), (550, 400)),
    "MSVD": ((450, 250, 200), (600, 200, 100, 100)),
    "ActivityNet": ((500,), (600, 300)),
    "DiDeMo": ((250, 150, 150, 150), (800, 100)),
    "LSMDC": ((400, 150, 150), (250, 250, 200, 200)),
    "SSV2-label": ((200, 200, 200, 100), (450, 250, 100)),
    "SSV2-template": ((400, 300), (350, 300, 100, 50)),
    "QA": ((600, 200), (400, 400, 100)),
}
# the paper's videos a second and R@1: base, vid-TLDR, with shift; question answering has no row there
PRINTED: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "MSRVTT": ((32.0, 50.0, 43.6, 50.8, 131.4, 50.8), (12.0, 58.7, 19.1, 58.5, 41.0, 58.6)),
    "MSVD": ((32.0, 62.1, 42.2, 62.7, 131.1, 62.8), (12.0, 70.3, 19.9, 70.4, 40.0, 70.6)),
    "ActivityNet": ((32.0, 57.2, 34.2, 56.6, 114.7, 56.8), (12.0, 65.6, 18.1, 65.2, 40.4, 66.0)),
    "DiDeMo": ((32.0, 62.1, 33.9, 62.4, 129.3, 62.0), (12.0, 70.8, 18.3, 70.4, 51.5, 70.9)),
    "LSMDC": ((32.0, 32.7, 36.5, 32.4, 110.7, 32.4), (12.0, 42.2, 16.6, 41.9, 50.8, 41.9)),
    "SSV2-label": ((32.0, 64.0, 34.1, 63.8, 114.4, 63.5), (12.0, 72.4, 16.4, 72.1, 39.9, 71.8)),
    "SSV2-template": ((32.0, 74.6, 38.1, 74.0, 106.6, 73.9), (12.0, 78.4, 16.0, 78.1, 45.2, 78.5)),
}
DIGITS_SHARES = {0: 0.2, 1: 0.1, 2: 0.05}
DENSE = (BASE, SDPA, COMPILED)
MERGING = (VID_TLDR, VID_TLDR_SHIFT, TOME, STREAM, WARD)
SHRUNK, QUICK_BLOCKS = 64, 3  # tokens of the paper's videos for each of the quick ones', and blocks of those


def paper(name: str, dataset: str) -> Paper:
    """What table 3 prints of a model on a dataset."""
    if dataset not in PRINTED:
        return {}
    figures = PRINTED[dataset][list(UMT).index(name)]
    pairs = zip((BASE, VID_TLDR, VID_TLDR_SHIFT), zip(figures[::2], figures[1::2], strict=True), strict=True)
    return {method: {"throughput": speed, "accuracy": recall} for method, (speed, recall) in pairs}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [*DENSE, *MERGING]
    for option, known, text in (
        ("--models", list(UMT), ""),
        ("--methods", names, "; speed-ups are over the first"),
        ("--datasets", list(COUNTS), ", whose published counts of merged tokens to take"),
    ):
        parser.add_argument(
            option, type=chosen(known), default=known, metavar="NAME,...", help=f"some of {','.join(known)}{text}"
        )
    parser.add_argument(
        "--timed", type=chosen(list(COUNTS)), default=["MSRVTT"], metavar="NAME,...", help="datasets to time"
    )
    add_shared(parser, rounds=5)
    add_data_arguments(parser, videos=True)


def run(args: argparse.Namespace) -> int:
    setting, datasets = Setting.of(args), args.datasets[: 2 if args.quick else None]
    if args.dataset is not None:
        datasets = [args.dataset]
    results = results_of(args, setting)
    subjects = [umt_encoder(name, (), 1, {}, args.quick, qa=False) for name in UMT if name in args.models]
    for subject in subjects if "accuracy" in setting.columns else ():  # before minutes of work
        check_umt(args, subject)
    shown: list[tuple[Subject, str, Row]] = []
    for subject in [*subjects, digits((), 1)]:
        columns = set(setting.columns) & measurable(subject, args)
        of_digits = subject.name == DIGITS
        if of_digits:  # there for their accuracy only
            columns &= {"accuracy"}
        if not columns:
            continue
        compiles = setting.backend != "eager" and "throughput" in columns
        bases = [dense(name) for name in args.methods if name in DENSE and (name != COMPILED or compiles)]
        for dataset in [""] if of_digits else datasets:
            counts = DIGITS_SHARES if of_digits else _counts(subject, dataset, args.quick)
            at = {"dataset": dataset} if dataset else {}
            methods = [*bases, *(merging(name, counts, at) for name in args.methods if name in MERGING)]
            wanted = columns if of_digits or dataset in args.timed else columns - {"throughput"}
            fill(results, subject, methods, wanted, setting, args)
            shown += [(subject, dataset, results.row(identity(subject, method))) for method in methods]
    if args.quick:
        shown = [(as_quick(subject), dataset, untimed(row)) for subject, dataset, row in shown]
    table = _table(shown, quick=args.quick)
    extra = [
        "vid-TLDR runs as published, with every attention written out and uncompiled; the other merging methods with",
        "the backend, flash attention and size bias. The paper's accuracy: R@1 on the dataset.",
    ]
    lines = [*notes([row for _, _, row in shown], setting), *extra]
    return give(table, lines, results.rows)


def _counts(subject: Subject, dataset: str, quick: bool) -> dict[int, int]:
    counts = COUNTS[dataset][list(UMT).index(subject.name)]
    if quick:  # the stand-ins have that many blocks
        return {block: r // SHRUNK for block, r in enumerate(counts[:QUICK_BLOCKS])}
    return dict(enumerate(counts))


def _table(shown: Sequence[tuple[Subject, str, Row]], quick: bool) -> str:
    lines = []
    for subject, dataset, row in shown:
        printed = {} if quick or subject.name not in UMT else paper(subject.name, dataset)
        mine, base = printed.get(row["method"], {}), printed.get(BASE, {})
        speed_up = ""
        if "speedup" in row:
            low, high = row["speedup_quartiles"]
            speed_up = f"{row['speedup']:.2f}x [{low:.2f}, {high:.2f}]"
        lines.append(
            [
                subject.name,
                dataset,
                METHODS[row["method"]],
                f"{row['gflops']:.3f}" if row["gflops"] >= 0.1 else f"{row['gflops']:.3g}",
                f"{row['throughput']:.4g}" if "throughput" in row else "",
                speed_up,
                f"{mine['throughput']:g} ({mine['throughput'] / base['throughput']:.2f}x)" if mine else "",
                f"{row['accuracy']:.1f}" if row.get("accuracy") is not None else "",
                f"{mine['accuracy']:.1f}" if mine else "",
            ]
        )
    heads = ["model", "counts of", "method", "GFLOPs", "vid/s", "speed-up [quartiles]", "paper", "accuracy", "paper"]
    filled = [i for i in range(len(heads)) if any(line[i] for line in lines)]
    align = ["left", "left", "left", "right", "right", "left", "right", "right", "right"]
    return tabulate(
        [[line[i] for i in filled] for line in lines],
        [heads[i] for i in filled],
        disable_numparse=True,
        colalign=[align[i] for i in filled],
    )
