"""Table 7: Vision Mamba tiny as it is, pruned by ToP-ViM's score, and by representation shift.

GFLOPs and throughput of ViM-T (random weights unless --checkpoint is given), accuracy on --imagenet, and of a
small Vision Mamba on the handwritten digits: `python -m bench table7 [--quick] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from timm.data import create_transform
from torch import Tensor

from bench.digits import load_digits
from bench.models.digits_vim import load_pretrained_digits_vim
from bench.models.vim import VisionMamba
from bench.tables.results import processor
from passes.graph.base import CompileError
from passes.graph.codes import Code
from rs_compile import OptimizedModel, Report, Schedule, TopViM, optimize, plan
from rs_compile.arguments import positive
from rs_compile.models import load_checkpoint
from rs_compile.timing import compiled, interleaved

BASE = "base"
TOP_VIM = "ToP-ViM"
PAPER = {BASE: (1.5, 76.1), TOP_VIM: (1.3, 75.1), "ours": (1.3, 75.5)}  # GFLOPs, top-1
TUNED = (
    "paper: top-1 is fine-tuned where tokens leave: ToP-ViM's code trains 30 epochs, and its log at this schedule has\n"
    "71.1 before and 74.8 after; ours, whose 75.5 is beside it, most likely as well. Nothing here is trained: compare "
    "with 71.1."
)
VIM_T = Schedule({9: 0.8, 19: 0.8}, rounding="kept")
DIGITS = Schedule({2: 0.8, 4: 0.8}, rounding="kept")  # at the same depth
QUICK_DIGITS = 100
Forward = Callable[[Tensor], Tensor]
Row = dict[str, Any]


def methods(schedule: Schedule) -> dict[str, Schedule]:
    """What is compared with the model itself, by the same counts."""
    return {
        TOP_VIM: replace(schedule, score=TopViM()),
        f"{TOP_VIM}, its code": replace(schedule, score=TopViM("code")),
        "ours": schedule,
        "ours, decay": replace(schedule, gap="decay"),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the table."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows with every round's seconds")
    parser.add_argument("--quick", action="store_true", help="a small stand-in, uncompiled: does every row run?")
    parser.add_argument("--backend", choices=("inductor", "eager"), help="default inductor; with --quick eager")
    parser.add_argument("--batch-size", type=positive, default=4, help="of timing and of --imagenet (default 4)")
    parser.add_argument("--rounds", type=positive, help="of timing, all methods in each (default 7)")
    parser.add_argument("--threads", type=positive, help="CPU threads, torch's own choice if not given")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--no-throughput", action="store_true", help="GFLOPs and accuracy only")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="ViM-T's weights, safetensors or torch.save's")
    parser.add_argument("--imagenet", type=Path, metavar="DIR", help="a folder a class; needs --checkpoint")
    parser.add_argument("--workers", type=int, default=4, help="processes that read pictures (default 4)")
    parser.add_argument("--limit", type=positive, help="so many pictures at most")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="an interrupted --imagenet goes on from it")


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Measures and prints the table; returns the exit code, 1 where pictures could not be read."""
    if args.imagenet is not None and (args.checkpoint is None or args.quick):
        raise CompileError(
            "--imagenet needs ViM-T and its weights: pass --checkpoint FILE, and no --quick", code=Code.COMMAND
        )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.backend = args.backend or ("eager" if args.quick else "inductor")
    model, schedule, side = VisionMamba(), VIM_T, 224
    if args.quick:
        model, schedule, side = VisionMamba(side=96, dim=64, depth=4), Schedule({1: 0.8, 2: 0.8}, rounding="kept"), 96
    if args.checkpoint is not None:
        load_checkpoint(model, args.checkpoint)
    model = model.eval().to(args.device)
    say("ViM-T: capturing the model")
    sample = torch.empty(1, 3, side, side, device=args.device)
    rows = costs({name: plan(model, s, sample, drop_unread=False) for name, s in methods(schedule).items()})
    if not args.no_throughput:
        throughput(rows, model, schedule, torch.randn(args.batch_size, 3, side, side).to(args.device), args)
    skipped = imagenet(rows, model, schedule, args) if args.imagenet is not None else []
    on_digits(rows, args.quick)
    print(table(rows, args))
    for picture in skipped:
        print(f"could not be read: {picture}", file=sys.stderr)
    if args.json is not None:
        args.json.write_text(json.dumps({"environment": environment(args), "rows": rows}, indent=2) + "\n")
    return int(bool(skipped))


def costs(reports: Mapping[str, Report]) -> dict[str, Row]:
    """GFLOPs of one image, counted on the rewritten graphs, and the tokens after each layer."""
    some = next(iter(reports.values()))
    rows = {BASE: {"gflops": some.flops_dense / 1e9, "tokens": [some.blocks[0].tokens_in]}}
    for name, report in reports.items():
        counts = dict.fromkeys([report.blocks[0].tokens_in, *(row.tokens_out for row in report.blocks)])
        rows[name] = {"gflops": report.flops / 1e9, "tokens": list(counts)}
    return rows


def forwards(model: VisionMamba, schedule: Schedule, backend: str) -> dict[str, Forward | OptimizedModel]:
    """The model itself and its pruned stand-ins, all through the same backend."""
    pruned = {name: optimize(model, s, backend=backend, drop_unread=False) for name, s in methods(schedule).items()}
    return {BASE: compiled(model, backend), **pruned}


def throughput(
    rows: dict[str, Row], model: VisionMamba, schedule: Schedule, images: Tensor, args: argparse.Namespace
) -> None:
    """Images a second and the speed-up over the base, all interleaved in one run."""
    calls = {name: (lambda f=f: f(images)) for name, f in forwards(model, schedule, args.backend).items()}
    rounds = args.rounds or (2 if args.quick else 7)
    timing = interleaved(calls, rounds, device=args.device, say=lambda text: say(f"ViM-T: {text}"))
    for name in calls:
        rows[name] |= {
            "throughput": len(images) / timing.of(name).median,
            "speedup": timing.ratio(BASE, name).to_dict(),
            "rounds_seconds": list(timing.seconds[name]),
        }


def imagenet(rows: dict[str, Row], model: VisionMamba, schedule: Schedule, args: argparse.Namespace) -> Sequence[Any]:
    """Top-1 in percent on a folder of pictures; returns those that could not be read."""
    from bench.evaluate.images import evaluate_images

    scores = evaluate_images(
        forwards(model, schedule, args.backend),
        BASE,
        args.imagenet,
        create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875),
        classes=model.head.out_features,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
        resume=args.resume,
        limit=args.limit,
        identity={"schedules": {name: s.to_json() for name, s in methods(schedule).items()}},
    )
    for name, score in scores.items():
        rows[name] |= {"top1": score.top1, "agreement": score.agreement, "images": score.images}
    return scores[BASE].skipped


def on_digits(rows: dict[str, Row], quick: bool) -> None:
    """Accuracy in percent of the small model on the digits' test images, uncompiled."""
    images, labels = load_digits("test")
    if quick:
        images, labels = images[:QUICK_DIGITS], labels[:QUICK_DIGITS]
    for name, forward in forwards(load_pretrained_digits_vim(), DIGITS, "eager").items():
        say(f"digits: {name}")
        right = (forward(images).argmax(1) == labels).double().mean()
        rows[name] |= {"digits": 100 * float(right), "digits_images": len(labels)}


def table(rows: Mapping[str, Row], args: argparse.Namespace) -> str:
    """The rows as text, the paper's figures beside ours."""
    model = "stand-in for ViM-T" if args.quick else "ViM-T"
    heads = [model, "tokens", "GFLOPs", "paper", "img/s", "speed-up [quartiles]", "top-1", "paper", "digits"]
    lines = [_line(name, row, args) for name, row in rows.items()]
    filled = [i for i in range(len(heads)) if any(line[i] for line in lines)]
    shown = [[line[i] for i in filled] for line in lines]
    text = [tabulate(shown, [heads[i] for i in filled], disable_numparse=True)]
    text.append("quick: a small stand-in for ViM-T, so that its numbers mean nothing" if args.quick else TUNED)
    where = ", ".join(f"{key} {value}" for key, value in environment(args).items())
    images = next(iter(rows.values()))["digits_images"]
    text.append(f"digits: % right of {images}, a Vision Mamba of 65 tokens, pruned to 41; {where}")
    return "\n".join(text)


def _line(name: str, row: Row, args: argparse.Namespace) -> list[str]:
    gflops, top1 = PAPER[name] if name in PAPER and not args.quick else ("", "")
    timed = {} if args.quick else row  # of a stand-in times mean nothing; they are in --json
    ratio = timed.get("speedup")
    return [
        name,
        " -> ".join(map(str, row["tokens"])),
        f"{row['gflops']:.3f}",
        str(gflops),
        f"{timed['throughput']:.2f}" if "throughput" in timed else "",
        f"{ratio['median']:.2f}x [{ratio['quartile_low']:.2f}, {ratio['quartile_high']:.2f}]" if ratio else "",
        f"{row['top1']:.1f}" if row.get("top1") is not None else "",
        str(top1),
        f"{row['digits']:.1f}",
    ]


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__,
        "backend": args.backend,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "batch": args.batch_size,
        "processor": processor(),
    }


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
