"""A table of models by methods, the paper's figures beside ours: tables 1, 2, 4 and 5."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from tabulate import tabulate

from bench.tables.measure import fill, identity, measurable, results_of
from bench.tables.methods import BASE, COMPILED, DENSE, METHODS, PRUNED, Method, dense, pruned
from bench.tables.notes import give, notes
from bench.tables.options import Setting, check_umt, chosen
from bench.tables.results import Row
from bench.tables.subjects import Subject


def add_choices(
    parser: argparse.ArgumentParser, models: Sequence[str], methods: Sequence[str] = (*DENSE, *PRUNED)
) -> None:
    """The options that pick rows of the table."""
    for option, names, text in (("--models", models, ""), ("--methods", methods, "; speed-ups are over the first")):
        parser.add_argument(
            option, type=chosen(names), default=list(names), metavar="NAME,...", help=f"some of {','.join(names)}{text}"
        )


def methods_for(subject: Subject, names: Sequence[str], eager_everywhere: bool) -> list[Method]:
    """The methods of these names, with the subject's schedule."""
    return [
        dense(name) if name in DENSE else pruned(name, subject.keep, subject.attention, eager_everywhere)
        for name in names
    ]


def compare(
    args: argparse.Namespace, subjects: Sequence[Subject], extra: Sequence[Subject], unit: str, note: str = ""
) -> int:
    """Measures and prints a table.

    Args:
        args: of `add_choices` and `options.add_arguments`, and of the data that the models' accuracy needs.
        subjects: the table's models.
        extra: models that are there whatever --models says, the digits ViT for one.
        unit: of throughput, "img/s".
        note: what the paper's accuracy is of.

    Returns:
        The exit code: 1 where files could not be read.

    Raises:
        CompileError: an option that cannot be followed, or a model that cannot be captured or pruned.
    """
    setting = Setting.of(args)
    results = results_of(args, setting)
    shown: list[tuple[Subject, Row]] = []
    wanted = [*(s for s in subjects if s.name in args.models), *extra]
    for subject in wanted:  # before minutes of work
        if "accuracy" in setting.columns:
            check_umt(args, subject)
    for subject in wanted:
        columns = set(setting.columns) & measurable(subject, args)
        if subject.data == "digits":  # there for their accuracy only
            columns &= {"accuracy"}
        if not columns:
            continue
        # uncompiled, torch.compile(base) is base-sdpa, and its accuracy is the base's in any case
        compiles = setting.backend != "eager" and "throughput" in columns
        names = [name for name in args.methods if name != COMPILED or compiles or columns == {"gflops"}]
        methods = methods_for(subject, names, setting.eager_everywhere)
        fill(results, subject, methods, columns, setting, args)
        shown += [(subject, results.row(identity(subject, method))) for method in methods]
    if setting.quick:
        shown = [(as_quick(subject), untimed(row)) for subject, row in shown]
    return give(text(shown, unit), notes([row for _, row in shown], setting, note), results.rows)


def as_quick(subject: Subject) -> Subject:
    """The subject of a row of --quick: a stand-in's row does not stand under the model's name."""
    return subject if subject.data == "digits" else replace(subject, name=f"stand-in for {subject.name}")


def untimed(row: Row) -> Row:
    """The row without times, which of a stand-in mean nothing; they are in --json."""
    return {k: v for k, v in row.items() if k not in ("throughput", "speedup", "speedup_quartiles")}


def text(shown: Sequence[tuple[Subject, Row]], unit: str) -> str:
    """The rows as a table; a column that nobody measured and the paper does not print is left out."""
    heads = ["model", "method", "GFLOPs", "paper", unit, "speed-up [quartiles]", "paper", "accuracy", "paper"]
    heads += ["agreement", "cosine", "KL"]
    lines = [_line(subject, row) for subject, row in shown]
    filled = [i for i in range(len(heads)) if any(line[i] for line in lines)]
    # the paper's figure goes where ours goes
    alone = {3: 2, 6: 4, 8: 7}
    filled = [i for i in filled if alone.get(i, i) in filled]
    align = ["left", "left", *["right"] * 3, "left", *["right"] * 6]
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
        f"{row['agreement']:.1f}" if "agreement" in row else "",
        f"{row['cosine']:.4f}" if "cosine" in row else "",
        f"{row['kl']:.4f}" if "kl" in row else "",
    ]
