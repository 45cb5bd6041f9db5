"""Fidelity at equal multiply-accumulates: each method by its own best ramp, searched on one half of the photographs.

What is printed is drift, 1 - cosine to the dense model's features, on the photographs that nothing was chosen on.
Without --images they are scikit-image's and scikit-learn's, three crops of each. --digits measures the digits' models
in its place: KL divergence of their logits, and accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from bench.digits import load_digits, load_pretrained_digits_vit
from bench.tables.fidelity import CROPS, pictures
from bench.tables.measure import say
from bench.tables.options import usable
from bench.tables.results import UsageError, commit
from rs_compile import Schedule, SearchResult, optimize, search
from rs_compile.arguments import positive
from rs_compile.drift import shown
from rs_compile.models import build
from rs_compile.search import Row

SEARCHED = 200  # digits
TOME = "ToMe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="a timm model (default %(default)s)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights; random ones if not given")
    parser.add_argument("--img-size", type=positive, metavar="PIXELS", default=224)
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures; the packages' photographs if not given")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="of the search; all if not given")
    parser.add_argument("--digits", action="store_true", help="the digits ViT and their test images, accuracy too")
    parser.add_argument("--gmacs", type=_numbers, metavar="G,...", default=(4.27, 3.6, 3.0, 2.4), help="budgets")
    parser.add_argument(
        "--shares", type=_numbers, metavar="SHARE,...", help="budgets, of the dense model, in their place"
    )
    parser.add_argument(
        "--every", action="store_true", help="refine every method, not only those near the best; slower"
    )
    parser.add_argument("--backend", choices=("inductor", "eager"), default="eager", help="of timed finalists")
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--threads", type=positive, help="CPU threads, torch's own choice if not given")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 (default cpu)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="keeps what is found in a file a budget")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every schedule that was tried")


def run(args: argparse.Namespace) -> int:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.resume is not None and not args.resume.is_dir():
        raise UsageError(f"--resume {args.resume} is no folder; make it first")
    labels: Tensor | None = None
    if args.digits:
        model: nn.Module = load_pretrained_digits_vit()
        searched, (held, labels), about = load_digits("train")[0][:SEARCHED], load_digits("test"), "handwritten digits"
    else:
        model = build(args.model, img_size=args.img_size, num_classes=None, checkpoint=args.checkpoint)
        searched, held, about = _photographs(model, args.images, args.img_size)
    model = model.to(usable(args.device))
    found: list[Found] = []
    for share, name in _shares(model, searched, args):

        def best(title: str, methods: Sequence[str] | None, share: float = share, **options: Any) -> SearchResult:
            say(f"{title}: searching")
            return search(
                model,
                searched,
                macs=share,
                held_out=held,
                methods=methods,
                every=args.every,
                limit=10**6,
                batch_size=args.batch_size,
                backend=args.backend,
                resume=None if args.resume is None else args.resume / f"{title}.jsonl",
                **options,
            )

        result = best(name, args.methods)
        print(f"\n{name}\n{result}\n", flush=True)
        as_published = None
        if any(row.method == TOME for row in result.rows):
            as_published = best(f"{name}, {TOME} as published", [TOME], drop_unread=False)
        found.append(Found(name, result, as_published))
    right = None if labels is None else Right(model, held, labels)
    if right is not None:
        print(f"dense accuracy {right.dense():.2f}%")
    print(_table(found, right))
    first = found[0].result
    print(
        f"{first.metric}, mean on {first.held} held-out pictures, searched on {first.searched} others; {about};"
        f" every method drops unread tokens, but for {TOME} as published; commit {commit()},"
        f" {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    )
    if args.json is not None:
        args.json.write_text(json.dumps([json.loads(f.result.to_json()) for f in found], indent=1) + "\n")
    return 0


def _photographs(model: nn.Module, folder: Path | None, side: int) -> tuple[Tensor, Tensor, str]:
    """Crops to search on and crops of other photographs to report on."""
    crops = pictures(model, folder, side)
    if folder is None:
        crops = torch.cat([crops, pictures(model, _sklearn_folder(), side)])
    of = torch.arange(len(crops)) // CROPS  # crops of one photograph stay in one half
    where = folder or "scikit-image's and scikit-learn's photographs"
    return crops[of % 2 == 0], crops[of % 2 == 1], f"{CROPS} crops of each of {len(of) // CROPS}: {where}"


def _sklearn_folder() -> Path:
    try:
        import sklearn.datasets
    except ImportError:
        raise UsageError("scikit-learn's photographs are not here; pip install scikit-learn") from None
    return Path(sklearn.datasets.__file__).parent / "images"


def _shares(model: nn.Module, images: Tensor, args: argparse.Namespace) -> list[tuple[float, str]]:
    if args.shares or args.digits:
        return [(share, f"{share:g} of dense") for share in args.shares or (0.8, 0.7, 0.6, 0.5)]
    from rs_compile import plan

    dense = plan(model, {}, images[:2]).macs_dense / 1e9
    return [(gmacs / dense, f"{gmacs:g} GMAC") for gmacs in args.gmacs]


@dataclass(frozen=True)
class Right:
    """How many labels a schedule gets right, in percent."""

    model: nn.Module
    images: Tensor
    labels: Tensor

    def dense(self) -> float:
        """Of the model itself."""
        return self.of(Schedule())

    @torch.no_grad()
    def of(self, schedule: Schedule) -> float:
        """Of the model pruned or merged by a schedule, uncompiled."""
        fast = optimize(self.model, schedule, backend="eager", verify=False)
        chosen = torch.cat([fast(images).argmax(-1) for images in self.images.split(100)])
        return 100 * (chosen == self.labels).double().mean().item()


@dataclass(frozen=True)
class Found:
    """What is best at a budget; ToMe as it was published computes every token of the last block, read or not."""

    budget: str
    result: SearchResult
    as_published: SearchResult | None


def _table(found: Sequence[Found], right: Right | None) -> str:
    """A row a method: its best ramp at each budget, and ToMe's uniform one by itself."""
    results = [f.result for f in found]
    names = dict.fromkeys(row.method for result in results for row in result.best)
    heads = ["", *(f.budget for f in found)]

    def line(title: str, row: Callable[[SearchResult], Row | None], of: Sequence[SearchResult | None]) -> list[str]:
        rows = [None if result is None else row(result) for result in of]
        return [title, *(_cell(r, right, result.winner.schedule) for r, result in zip(rows, results, strict=True))]

    published = [f.as_published for f in found]
    lines = [
        line(f"{TOME} as published, uniform", _uniform, published),
        line(f"{TOME} as published, best ramp", partial(_best, method=TOME), published),
        line(f"{TOME}, uniform", _uniform, results),
        *(line(name, partial(_best, method=name), results) for name in names),
        line("the search's choice", lambda result: result.winner, results),
    ]
    return tabulate(lines, heads, disable_numparse=True, tablefmt="github")


def _best(result: SearchResult, method: str) -> Row | None:
    """The ramp that had least drift on the pictures searched on."""
    rows = [r for r in result.best if r.method == method and r.drift is not None]
    return min(rows, key=lambda r: r.drift or 0.0, default=None)


def _uniform(result: SearchResult) -> Row | None:
    return next((r for r in result.best if r.method == TOME and r.shape == "uniform from 0"), None)


def _cell(row: Row | None, right: Right | None, chosen: Schedule) -> str:
    if row is None:
        return ""
    mark = "**" if row.schedule == chosen else ""
    same = "" if row.held_agreement is None else f", {100 * row.held_agreement:.1f}% as dense"
    same += "" if right is None else f", {right.of(row.schedule):.2f}% right"
    drift, error = shown(row.held_drift or 0.0, row.held_error or 0.0).split(" ± ")
    return f"{mark}{drift}{mark} ± {error}{same}, {row.shape}"


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NUMBER,NUMBER,..., like 4.27,3.0") from None
