"""A table of models by methods, the paper's figures beside ours: tables 1, 2, 4 and 5."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tabulate import tabulate

from bench.tables.measure import fill_accuracy, fill_gflops, fill_throughput, identity, results_of, timed
from bench.tables.methods import BASE, COMPILED, METHODS, SDPA, Method, dense, pruned
from bench.tables.options import Setting, chosen
from bench.tables.results import Row
from bench.tables.subjects import Subject

DENSE = (BASE, SDPA, COMPILED)


def add_choices(
    parser: argparse.ArgumentParser, models: Sequence[str], methods: Sequence[str] = tuple(METHODS)
) -> None:
    """The options that pick rows of the table."""
    for option, names, text in (("--models", models, ""), ("--methods", methods, "; speed-ups are over the first")):
        parser.add_argument(
            option, type=chosen(names), default=list(names), metavar="NAME,...", help=f"some of {','.join(names)}{text}"
        )


def methods_for(subject: Subject, names: Sequence[str], eager_everywhere: bool) -> list[Method]:
    """The methods of these names, with the subject's schedule."""
    return [
        dense(name) if name in DENSE else pruned(name, subject.keep, subject.importance, eager_everywhere)
        for name in names
    ]


def compare(args: argparse.Namespace, subjects: Sequence[Subject], digits: Subject, unit: str, note: str = "") -> None:
    """Measures and prints a table.

    Args:
        args: of `add_choices` and `options.add_arguments`, and `add_image_arguments` for models of images.
        subjects: the table's models.
        digits: what accuracy is measured on where no pictures are given.
        unit: of throughput, "img/s".
        note: what the paper's accuracy is of.

    Raises:
        CompileError: an option that cannot be followed, or a model that cannot be captured or pruned.
    """
    setting = Setting.of(args)
    results = results_of(args, setting)
    pictures = getattr(args, "imagenet", None) is not None
    shown: list[tuple[Subject, Row]] = []
    for subject in [*(s for s in subjects if s.name in args.models), digits]:
        columns = set(setting.columns) & _measurable(subject, pictures)
        if not columns:
            continue
        methods = methods_for(subject, args.methods, setting.eager_everywhere)
        if "throughput" in columns:
            fill_throughput(results, subject, timed(methods, setting.backend), setting)
        if "accuracy" in columns:
            fill_accuracy(results, subject, methods, setting, args)
        fill_gflops(results, subject, methods)  # what the others have not captured
        shown += [(subject, results.row(identity(subject, method))) for method in methods]
    print(text(shown, unit))
    for line in notes(shown, setting, note):
        print(line)


def _measurable(subject: Subject, pictures: bool) -> set[str]:
    if subject.data == "digits":
        return set() if pictures else {"accuracy"}
    return {"gflops", "throughput"} | ({"accuracy"} if pictures and subject.data == "images" else set())


def text(shown: Sequence[tuple[Subject, Row]], unit: str) -> str:
    """The rows as a table; a column that nobody measured and the paper does not print is left out."""
    heads = ["model", "method", "GFLOPs", "paper", unit, "speed-up [quartiles]", "paper", "accuracy", "paper"]
    lines = [_line(subject, row) for subject, row in shown]
    filled = [i for i in range(len(heads)) if any(line[i] for line in lines)]
    # the paper's figure goes where ours goes
    alone = {3: 2, 6: 4, 8: 7}
    filled = [i for i in filled if alone.get(i, i) in filled]
    align = ["left", "left", *["right"] * 3, "left", "right", "right", "right"]
    return tabulate(
        [[line[i] for i in filled] for line in lines],
        [heads[i] for i in filled],
        disable_numparse=True,
        colalign=[align[i] for i in filled],
    )


def _line(subject: Subject, row: Row) -> list[str]:
    printed = subject.paper.get(row["method"], {})
    base = subject.paper.get(BASE, {})
    paper_speed = ""
    if "throughput" in printed:
        paper_speed = f"{printed['throughput']:g} ({printed['throughput'] / base['throughput']:.2f}x)"
    speed_up = ""
    if "speedup" in row:
        low, high = row["speedup_quartiles"]
        speed_up = f"{row['speedup']:.2f}x [{low:.2f}, {high:.2f}]"
    return [
        subject.name,
        METHODS[row["method"]],
        f"{row['gflops']:.3f}" if row["gflops"] >= 0.1 else f"{row['gflops']:.3g}",
        f"{printed['gflops']:.1f}" if "gflops" in printed else "",
        f"{row['throughput']:.4g}" if "throughput" in row else "",
        speed_up,
        paper_speed,
        f"{row['accuracy']:.1f}" if row.get("accuracy") is not None else "",
        f"{printed['accuracy']:.1f}" if "accuracy" in printed else "",
    ]


def notes(shown: Sequence[tuple[Subject, Row]], setting: Setting, note: str = "") -> list[str]:
    """What a reader must know about the numbers above."""
    rows = [row for _, row in shown]
    lines = ["GFLOPs: of one sample, counted on the rewritten graph in fvcore's convention."]
    if setting.quick:
        lines.insert(0, "quick: small stand-ins for the models named, so that the numbers mean nothing.")
    if any("throughput" in row for row in rows):
        batches = "/".join(dict.fromkeys(str(row["batch"]) for row in rows if "batch" in row))
        lines.append(
            f"throughput: {setting.describe()}, batch {batches}, medians of {setting.rounds} interleaved rounds, "
            f"pruned models with backend {setting.backend}; the paper's: RTX A6000."
        )
    measured = {row["data"]: row["images"] for row in rows if "data" in row}
    for data, images in measured.items():
        if data == "digits":
            lines.append(f"accuracy: of the demo's digits ViT on {images} digits, as no other data was given.")
        else:
            lines.append(f"accuracy: top-1 in % on {images} pictures of {data}.")
    return [*lines, *([note] if note and measured else [])]
