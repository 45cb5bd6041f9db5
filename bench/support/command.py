"""The support matrix: what families of models can do, each cell tried on a small model with random weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from bench.coverage.command import compact
from bench.support.doing import COLUMNS, outcome, tried
from bench.support.families import families
from bench.tables.results import Results, UsageError, environment

PAGE, DATA = Path("docs/support.md"), Path("bench/results/support.json")
HEADS = ("prune", "merge", "train", "export .pt2", "GPU code", "search", "export .onnx")
WORDS = {"gpu": "lowers"}  # in the place of "yes", which would say too much
_TEXT = """\
# Support matrix

Each cell was tried on a small model of the family (random weights, about four blocks, small images), by
`python -m bench support`, which writes `bench/results/support.json` and this page. Whether each of 518 families
prunes, held against pruning by hand, says `COVERAGE.md`.

**Nothing here ran on a GPU.** A cell under "GPU code" means only that code was generated: the pruned model, in half
precision, was captured on fake CUDA tensors and lowered by Inductor for an H100 that is not there. That the code is
right or fast is not said. `python -m bench gpu` measures on a real one.

{matrix}

- **prune**: tokens leave after the first block that lets them (of a CNN rows and columns after a stage). The outputs
  have the model's structure and shapes and other values, for fewer multiply-accumulates. In the cell: after how many
  blocks tokens can leave, as `explain` says.
- **merge**: the same with a quarter of the tokens merged, by `Ward()`; by `Stream()`, or without its
  size bias, where that refuses.
- **search**: `rs_compile.search(..., macs=0.9)` over pruning by shift and `Ward()` finds a schedule.
- **train**: a backward pass in train mode gives a gradient to every parameter that has one in the dense model.
- **export**: `rs_compile.export` writes the file, and what `torch.export.load` (to the bit) or ONNX Runtime computes
  from it is what the pruned model computes.
- **GPU code**: the schedule is that of **prune**. In the cell: how many attention ops are CUDA's flash attention by
  name, in the graph and in the code, and what keeps it from the others, whose kernel the GPU chooses. "No CUDA graph":
  `mode="reduce-overhead"` would record none (VideoMAE keeps its table of positions on the CPU). Of ViTs and a CNN
  `tests/gpu_lowering/` also counts the launches, and compiles the kernels to machine code.

A code is a refusal; its section says what it means and the way out.

## What was tried, and what is refused

{details}

With torch {torch} and timm {timm}, on a CPU, uncompiled (`backend="eager"`).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=Path, default=DATA, metavar="FILE", help=f"rows; a rerun goes on (default {DATA})"
    )
    parser.add_argument("--markdown", type=Path, default=PAGE, metavar="FILE", help=f"the page (default {PAGE})")
    parser.add_argument("--only", help="families, with semicolons between them")


def run(args: argparse.Namespace) -> int:
    """Returns 1 where a cell is wrong or a fault."""
    wanted = families()
    if args.only is not None:
        names = args.only.split(";")
        unknown = [n for n in names if n not in [f.name for f in wanted]]
        if unknown:
            raise UsageError(f"--only {unknown[0]}: write some of {'; '.join(f.name for f in wanted)}")
        wanted = [f for f in wanted if f.name in names]
    results = Results(args.json, environment("support", {}))
    models = {f.name: cache(partial(tried, f)) for f in wanted}
    for column in COLUMNS:
        for family in wanted:
            identity = {"family": family.name, "model": family.model}
            if column not in results.row(identity):
                found = outcome(getattr(models[family.name](), column))
                results.fill(identity, {column: found})
                print(f"{family.name}, {column}: {found}", file=sys.stderr)
    rows = [results.row({"family": f.name, "model": f.model}) for f in wanted]
    args.markdown.write_text(page(rows, environment("support", {})))
    return int(any(r[c]["result"] in ("WRONG", "FAULT") for r in rows for c in COLUMNS))


def page(rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    matrix = [[r["family"], *(cell(r[c], WORDS.get(c, "yes")) for c in COLUMNS)] for r in rows]
    tried_on = [[r["family"], r["model"], _refusals(r)] for r in rows]
    return _TEXT.format(
        matrix=compact(matrix, ["family", *HEADS]),
        details=compact(tried_on, ["family", "tried on", "refused"]),
        torch=where["torch"],
        timm=where["timm"],
    )


def cell(found: Mapping[str, Any], done: str = "yes") -> str:
    """What a cell says, `done` where it went well."""
    if found["result"] in ("yes", "no"):
        word = done if found["result"] == "yes" else "no"
        return f"{word}: {found['note']}" if found["note"] else word
    if found["result"] == "refused":
        return f"[{found['code']}](troubleshooting.md#{found['code'].lower()})"
    return str(found["result"])


def _refusals(found: Mapping[str, Any]) -> str:
    """What each refusal says, once."""
    said: dict[str, list[str]] = {}
    for head, column in zip(HEADS, COLUMNS, strict=True):
        if found[column]["result"] not in ("yes", "no"):
            said.setdefault(found[column]["note"].replace("|", "\\|").replace("<", "&lt;"), []).append(head)
    return "; ".join(f"{', '.join(heads)}: {text}" for text, heads in said.items())
