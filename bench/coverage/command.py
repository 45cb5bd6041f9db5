"""Every architecture family of timm, transformers, torchvision and open_clip: does it prune, and is it right?

One model of each family, with random weights, small. Each goes through capture and matching; at keep ratio 1 it is
held bit for bit against itself, at 0.7 against pruning by hand, and its outputs against their own structure and shapes.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from tabulate import tabulate

from bench.coverage.check import BROKEN, FAULT, GRID, GRID_ALONE, PRUNED, REFUSED, UNHOOKED, WRONG, Row
from bench.coverage.subject import Subject, subjects
from bench.coverage.workers import checked
from bench.tables.options import chosen
from bench.tables.results import Results, UsageError, commit, environment
from rs_compile.arguments import positive

LIBRARIES = ("timm", "transformers", "torchvision", "open_clip")
_INTRODUCTION = """\
# Coverage

One model of every architecture family in {versions}, with random weights, few layers and small images; {commits}.
`python -m bench coverage --markdown COVERAGE.md` makes this file; `tests/test_coverage.py` checks some of its rows.

- **{pruned}**: at keep ratio 1 the output is bit-equal to the model's. At 0.7 after two blocks it has its structure,
  shapes and dtypes, and is what pruning by hand gives (`bench/coverage/oracle.py`: tokens stay in place, masked and
  frozen). The score is the default one, but for *by the block's shift*: there an eager run does not show the MLP's
  alone. *difference* is the largest, relative to the largest value, in float64 where the model runs in it.
- **{unhooked}**: the same, but for the comparison: a block is no module that could be hooked or an MLP
  alone, or what leaves the model does not depend on pruned tokens.
- **{grid}**: a CNN; after a cut of a stage its output has its shape, and is what the model itself returns when that
  map is made smaller by hand in its eager run (`bench/coverage/grid_twin.py`); a map has cells of that smaller one.
- **{grid_alone}**: its output has its shape, but does not depend on the cut, or the model cannot go on with a smaller
  map.
- **{refused}**: no token can leave, with the op, its line and why; `rs_compile.explain` says the way out as well.
- **{wrong}**: one of these does not hold, with what differs. Do not use it.

*compiled*: also through Inductor, and equal. *time*: capture and passes over torch.export alone, processor time, on
graphs of few layers.
"""
_PACKAGES = {"open_clip": "open_clip_torch"}
_COMPILED_EVERY = 40
_BY_BLOCK = ", by the block's shift"
_QUICK = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--library", type=chosen(LIBRARIES), default=list(LIBRARIES), help=f"some of {LIBRARIES}")
    parser.add_argument("--only", help="families or models, with commas between them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, saved as they are found; a rerun goes on")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="where to write the table, as COVERAGE.md is")
    parser.add_argument("--jobs", type=positive, default=1, help="processes (default 1)")
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK} families of each library")


def run(args: argparse.Namespace) -> int:
    """Returns 1 where a model came out wrong or faulted."""
    everything = [subject for library in args.library for subject in subjects(library)]
    wanted = _chosen(everything, args.only, args.quick)
    results = Results(args.json, environment("coverage", {}))
    todo = [s for s in wanted if not results.row(_identity(s))]
    sample = {(s.library, s.name) for s in everything[::_COMPILED_EVERY]}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("coverage", total=len(wanted), completed=len(wanted) - len(todo))
        for subject, row in checked(todo, sample, args.jobs):
            results.fill(_identity(subject), row | {"commit": commit()})
            progress.console.print(f"{subject.library} {subject.name}: {row['result']}")
            progress.advance(task)
    rows = [results.row(_identity(s)) for s in wanted]
    text = table(rows)
    print(text)
    if args.markdown is not None:
        versions = ", ".join(f"{name} {version(_PACKAGES.get(name, name))}" for name in args.library)
        names = {
            "versions": versions,
            "commits": _commits(rows),
            "pruned": PRUNED,
            "unhooked": UNHOOKED,
            "grid": GRID,
            "grid_alone": GRID_ALONE,
            "refused": REFUSED,
            "wrong": WRONG,
        }
        args.markdown.write_text(f"{_INTRODUCTION.format(**names)}\n{text}\n")
    return int(any(row["result"] in (WRONG, FAULT) for row in rows))


def _commits(rows: Sequence[Row]) -> str:
    """The commit of the rows, and how many are of another where a run went on."""
    (first, _), *others = Counter(row["commit"] for row in rows).most_common()
    return f"commit {first}" + "".join(f" ({count} of {other})" for other, count in others)


def table(rows: list[Row]) -> str:
    """The rows as Markdown: what came out in numbers, then a line for each model."""
    counts = Counter((row["library"], row["result"]) for row in rows)
    results = list(dict.fromkeys(sorted((row["result"] for row in rows), key=_order)))
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    sums = [
        [result, *(counts[y, result] for y in libraries), sum(counts[y, result] for y in libraries)]
        for result in results
    ]
    total = ["all", *(sum(counts[y, r] for r in results) for y in libraries), len(rows)]
    parts = [tabulate([*sums, total], ["", *libraries, "all"], tablefmt="github")]
    for library in libraries:
        heads = ["family", "model", "blocks", "prunable", "result", "difference", "time", "why not"]
        lines = [_line(row) for row in rows if row["library"] == library]
        parts.append(f"## {library}\n\n{compact(lines, heads)}")
    return "\n\n".join(parts)


def compact(lines: Sequence[Sequence[str]], heads: Sequence[str]) -> str:
    """A Markdown table whose columns are not padded."""
    text = tabulate(lines, heads, tablefmt="github", disable_numparse=True)
    return re.sub(r"-{3,}", "---", re.sub(r" {2,}", " ", text))


def _line(row: Row) -> list[str]:
    ratio = f"{row['rewrite'] / row['export']:.1f}x" if row.get("rewrite") and row.get("export") else ""
    why = re.sub(r'(?<=["\s])/[^"\s]*/site-packages/', "", row.get("detail", "").partition("way out:")[0])
    return [
        row["family"],
        row["name"],
        str(row.get("blocks", "")),
        str(row.get("prunable", "")),
        row["result"] + _BY_BLOCK * ("score" in row) + ", compiled" * bool(row.get("compiled")),
        f"{row['error']:.0e}" if "error" in row else "",
        ratio,
        " ".join(why.split()).replace("|", "\\|"),
    ]


def _order(result: str) -> int:
    names = (PRUNED, UNHOOKED, GRID, GRID_ALONE, REFUSED, BROKEN, FAULT, WRONG)
    return names.index(result)


def _identity(subject: Subject) -> dict[str, str]:
    return {"library": subject.library, "family": subject.family, "name": subject.name}


def _chosen(everything: list[Subject], only: str | None, quick: bool) -> list[Subject]:
    if only is not None:
        names = only.split(",")
        unknown = [n for n in names if not any(n in (s.name, s.family) for s in everything)]
        if unknown:
            raise UsageError(f"--only {unknown[0]}: no such family or model; the table without --only names them")
        return [s for s in everything if s.name in names or s.family in names]
    if quick:
        of_library = {library: [s for s in everything if s.library == library] for library in LIBRARIES}
        return [s for found in of_library.values() for s in found[:: max(1, len(found) // _QUICK)]]
    return everything
