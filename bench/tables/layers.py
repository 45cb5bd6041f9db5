"""Figures 3 and 5 without labels: drift of outputs when tokens leave after one block, by score and block.

1 - cosine of features of photographs (scikit-image's unless --images is given), or with --digits KL divergence of the
digits ViT's logits. Random selection, the mean of several draws, is the floor that a score must get below.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from tabulate import tabulate
from torch import Tensor, nn

from bench.digits import load_digits, load_pretrained_digits_vit
from bench.tables import figure5
from bench.tables.fidelity import pictures
from bench.tables.measure import say
from bench.tables.results import Results, Row, UsageError, environment
from passes.sites.score import Metric, Operation
from rs_compile import ClassAttention, MeanAttention, Random, Schedule, Score, Shift, optimize
from rs_compile.arguments import positive
from rs_compile.drift import cosine, divergence
from rs_compile.models import build
from rs_compile.planning import Planner
from rs_compile.search.methods import keep_ratios

RANDOM, CLASS, MEAN = "random", "class attention", "mean attention"
SCORES: Mapping[str, Score] = {
    **{
        figure5.name(operation, metric): Shift(operation, metric)
        for operation in get_args(Operation)
        for metric in get_args(Metric)
    },
    CLASS: ClassAttention(),
    MEAN: MeanAttention(),
    RANDOM: Random(),
}
# what the paper says of figures 3, 5a and 5b: the first drifts less than each of the others
CLAIMS = {
    "attention shift (L2) beats class attention (figure 3)": (figure5.name("attention", "l2"), (CLASS,)),
    "of L2 shifts the MLP's is best (figure 5a)": (
        figure5.name("mlp", "l2"),
        (figure5.name("attention", "l2"), figure5.name("block", "l2")),
    ),
    "of the MLP's shifts L2 is best (figure 5b)": (
        figure5.name("mlp", "l2"),
        (figure5.name("mlp", "l1"), figure5.name("mlp", "cosine")),
    ),
    "the MLP's L2 shift beats random": (figure5.name("mlp", "l2"), (RANDOM,)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="a timm model (default %(default)s)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights; random ones if not given")
    parser.add_argument("--img-size", type=positive, metavar="PIXELS", default=224)
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures; scikit-image's if not given")
    parser.add_argument("--digits", action="store_true", help="the digits ViT and their test images")
    parser.add_argument("--limit", type=positive, metavar="N", help="so many crops, or digits, at most")
    parser.add_argument("--leave", type=float, default=0.5, metavar="SHARE", help="of all tokens (default %(default)s)")
    parser.add_argument("--blocks", type=_blocks, default=(0, 2, 4, 6, 8), metavar="N,...", help="default 0,2,4,6,8")
    parser.add_argument("--draws", type=positive, default=3, help="of random selection (default %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, saved as they are measured; a rerun goes on")


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    if not 0 < args.leave < 1:
        raise UsageError(f"--leave {args.leave}: write a share between 0 and 1")
    if args.digits:
        model: nn.Module = load_pretrained_digits_vit()
        images, about, measure = load_digits("test")[0], "digits", "KL divergence of logits, in thousandths"
    else:
        model = build(args.model, img_size=args.img_size, num_classes=None, checkpoint=args.checkpoint)
        images = pictures(model, args.images, args.img_size)
        about, measure = "crops of photographs", "1 - cosine of features, in thousandths"
    if args.limit is not None:
        images = images[torch.linspace(0, len(images) - 1, min(args.limit, len(images))).round().long()]
    names = ("model", "checkpoint", "img_size", "images", "digits", "leave", "draws")
    settings = {name: str(getattr(args, name)) for name in names}
    results = Results(args.json, environment("layers", settings | {"pictures": len(images)}))
    dense = _outputs(model, images, args.batch_size)
    blocks = [b for b in args.blocks if not args.digits or b < 5]  # behind its last block nothing reads the patches
    planner = Planner(images[: args.batch_size])  # one capture for all
    dense_report = planner.plan(optimize(model, Schedule(), backend="eager"))
    tokens = dense_report.blocks[0].tokens_in if dense_report.blocks else None
    if tokens is None:
        raise UsageError("the model has no blocks on [batch, tokens, channels]; rs-compile explain says what was found")
    for block in blocks:
        _fill(results, model, images, dense, block, tokens, planner, args)
    rows = {name: {b: results.row({"score": name, "block": b}) for b in blocks} for name in SCORES}
    left = next(iter(rows[RANDOM].values()))
    print(_table(rows))
    print(
        f"{measure}; {len(images)} {about}. After one block {left['leave']} of {left['tokens']} tokens leave. "
        f"**best of the block**; (not below random by its standard error); random: mean of {args.draws} draws."
    )
    for claim, (first, others) in CLAIMS.items():
        holds = [b for b in blocks if all(_below(rows[first][b], rows[other][b]) >= 0 for other in others)]
        clear = [b for b in blocks if all(_below(rows[first][b], rows[other][b]) > 0 for other in others)]
        print(f"{claim}: on average at {len(holds)} of {len(blocks)} blocks, beyond standard error at {len(clear)}")
    return 0


def _fill(
    results: Results,
    model: nn.Module,
    images: Tensor,
    dense: Tensor,
    block: int,
    tokens: int,
    planner: Planner,
    args: argparse.Namespace,
) -> None:
    """The rows of one block."""
    leave = int(args.leave * tokens)
    keep = keep_ratios({block: leave}, [tokens] * (block + 1))
    for name, score in SCORES.items():
        if results.row({"score": name, "block": block}):
            continue
        handle, drawn = optimize(model, Schedule(keep, score=score), backend="eager"), []
        planner.plan(handle)
        for draw in range(args.draws if name == RANDOM else 1):
            torch.manual_seed(draw)
            outputs = _outputs(handle, images, args.batch_size)
            drawn.append(divergence(outputs, dense) if args.digits else cosine(outputs, dense))
        drift = torch.stack([d.double() for d in drawn]).mean(0)
        values = {"drift": drift.tolist(), "leave": leave, "tokens": tokens}
        results.fill({"score": name, "block": block}, values)
        say(f"block {block}: {name} {1000 * drift.mean():.2f}")


def _outputs(model: nn.Module, images: Tensor, batch: int) -> Tensor:
    return torch.cat([model(part) for part in images.split(batch)])


def _below(row: Row, other: Row) -> int:
    """1 where it drifts less than the other beyond the standard error of the difference, 0 where less, else -1."""
    apart = torch.tensor(other["drift"]) - torch.tensor(row["drift"])
    mean, error = apart.mean(), apart.std() / len(apart) ** 0.5
    return 1 if mean > error else 0 if mean > 0 else -1


def _table(rows: Mapping[str, Mapping[int, Row]]) -> str:
    blocks = list(rows[RANDOM])
    means = {(name, b): sum(row["drift"]) / len(row["drift"]) for name, of in rows.items() for b, row in of.items()}
    best = {b: min((means[name, b], name) for name in rows)[1] for b in blocks}

    def cell(name: str, block: int) -> str:
        text = f"{1000 * means[name, block]:.2f}"
        if best[block] == name:
            return f"**{text}**"
        unclear = name != RANDOM and _below(rows[name][block], rows[RANDOM][block]) < 1
        return f"({text})" if unclear else text

    lines = [[name, *(cell(name, b) for b in blocks)] for name in rows]
    return tabulate(lines, ["", *(f"block {b}" for b in blocks)], disable_numparse=True, tablefmt="github")


def _blocks(text: str) -> Sequence[int]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of blocks; write numbers from 0 on, 0,2,4")
    return sorted({int(part) for part in text.split(",")})
