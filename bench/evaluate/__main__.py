"""`python -m bench.evaluate images | retrieval | vqa`: a dense model and its pruned stand-in on your own data.

Results on stdout, progress on stderr. Under `torchrun --nproc-per-node N -m bench.evaluate ...` every process takes a
share. Exit codes: 0 done, 1 done, but files could not be read, 2 something that the user can mend (the message
says how), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config

from bench.evaluate import printed
from bench.evaluate.encoders import load_encoder, with_vision
from bench.evaluate.images import evaluate_images
from bench.evaluate.journal import EvaluationError
from bench.evaluate.printed import DENSE, PRUNED, Result, digits
from bench.evaluate.ranks import Ranks
from bench.evaluate.retrieval import evaluate_retrieval
from bench.evaluate.sweep import skipped_text
from bench.evaluate.umt import command as umt
from bench.models.umt_tasks import UMT_SIZES
from passes.graph.base import CompileError
from rs_compile import arguments, commands, models, optimize
from rs_compile.arguments import count, positive
from rs_compile.schedule import Schedule

FRAMES = 12  # of a video


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        commands.check_json(args.json)
        scores, text, about = args.command(args)
        skipped = scores[DENSE].skipped
        if Ranks.join().first:
            rows = [{"method": name, **asdict(score)} for name, score in scores.items()]
            commands.give(text, lambda: json.dumps({**about, "rows": rows}, indent=2), args.json)
            if skipped:
                print(skipped_text(skipped), file=sys.stderr)
        return 1 if skipped else 0
    except CompileError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        on = f"; the same command goes on from {args.resume}" if args.resume else "; with --resume FILE it would go on"
        print(f"evaluate: interrupted{on}", file=sys.stderr)
        return 130


def _images(args: argparse.Namespace) -> Result:
    device, dtype = Ranks.join().device(commands.device_of(args.device)), commands.DTYPES[args.dtype]
    torch.manual_seed(0)  # --random-weights: the same in every process, and when it is resumed
    model = models.build(
        args.model,
        img_size=args.img_size,
        num_classes=args.num_classes,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
    ).to(device, dtype)
    classes = int(getattr(model, "num_classes", 0))
    if not classes:
        raise EvaluationError(f"{args.model} has no classifier; leave --num-classes out, or pass that of the weights")
    size = models.input_size(model, args.img_size)
    transform: Any = create_transform(**resolve_model_data_config(model, args={"input_size": size}))
    schedule = Schedule.of(args.schedule)
    scores = evaluate_images(
        {DENSE: model, PRUNED: optimize(model, schedule, backend=args.backend)},
        DENSE,
        args.imagenet,
        transform,
        classes=classes,
        identity={"model": args.model, **printed.identity(args)},
        colours="L" if size[0] == 1 else "RGB",
        resume=args.resume,
        **printed.settings(args, device, dtype),
    )
    rows = [
        [name, *(digits(v, 2) for v in (s.top1, s.top5, s.agreement)), digits(s.cosine, 4), digits(s.kl, 4)]
        for name, s in scores.items()
    ]
    heads = ["model", "top-1 %", "top-5 %", "agreement %", "cosine", "KL, nats"]
    one = scores[DENSE]
    title = f"{args.model}, {one.images} pictures of {args.imagenet}, {printed.pruning(args)}"
    unlabelled = ["without class folders there are no labels: no accuracy"] if one.top1 is None else []
    return (
        scores,
        printed.table(title, rows, heads, [*printed.notes(args), *unlabelled]),
        {"model": args.model, "images": str(args.imagenet), **printed.about(args)},
    )


def _retrieval(args: argparse.Namespace) -> Result:
    if args.umt is not None:
        return umt.retrieval(args)
    for_umt = ("checkpoint", "text_config", "annotations", "dataset", "per_frame")
    if given := [f"--{name.replace('_', '-')}" for name in for_umt if getattr(args, name)]:
        raise EvaluationError(f"{', '.join(given)} goes with --umt, not with --encoder")
    if args.captions is None:
        raise EvaluationError("--encoder takes --captions FILE too")
    frames = args.frames or FRAMES
    device, dtype = Ranks.join().device(commands.device_of(args.device)), commands.DTYPES[args.dtype]
    encoder: Any
    encoder, transform = load_encoder(args.encoder, pretrained=args.pretrained, random_weights=args.random_weights)
    encoder = encoder.to(device, dtype)
    schedule = Schedule.of(args.schedule)
    pruned = with_vision(encoder, lambda tower: optimize(tower, schedule, backend=args.backend))
    scores = evaluate_retrieval(
        {DENSE: encoder, PRUNED: pruned},
        args.videos,
        args.captions,
        transform,
        frames=frames,
        identity={"encoder": args.encoder, **printed.identity(args)},
        resume=args.resume,
        **printed.settings(args, device, dtype),
    )
    rows = [row for name, score in scores.items() for row in printed.recall_rows(name, score)]
    one = scores[DENSE]
    title = (
        f"{args.encoder}, {one.videos} videos of {args.videos}, {one.captions} captions, {frames} frames, "
        f"{printed.pruning(args)}"
    )
    about = {"encoder": args.encoder, "videos": str(args.videos), "captions": str(args.captions), **printed.about(args)}
    return scores, printed.table(title, rows, printed.RECALL_HEADS, printed.notes(args)), about


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.evaluate", description=(__doc__ or "").partition("\n\n")[2])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], Result], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    sub = add("images", _images, "Top-1 and top-5, agreement and drift of a timm model on a folder of pictures.")
    sub.add_argument("--model", required=True, help="timm's name for it")
    sub.add_argument(
        "--imagenet",
        type=Path,
        required=True,
        metavar="DIR",
        help="a folder of class folders, or of unlabelled pictures",
    )
    _add_weights(sub, "weights from timm's hub, or its cache", required=True)
    arguments.add_model_options(sub)
    _add_common(sub, batch_size=64)

    sub = add(
        "retrieval",
        _retrieval,
        "R@1/5/10 of a dual encoder, or of UMT with its re-ranking, on a folder of videos; the vision tower is pruned.",
    )
    model = sub.add_mutually_exclusive_group(required=True)
    model.add_argument("--encoder", metavar="DIR", help="a dual encoder, as transformers' save_pretrained makes it")
    model.add_argument("--umt", choices=UMT_SIZES, help="UMT-B or UMT-L, whole")
    sub.add_argument("--videos", type=Path, required=True, metavar="DIR", help="the folder of the video files")
    sub.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help='for an encoder: {"video.mp4": ["a caption", ...]} or [{"video": ..., "caption": ...}, ...]',
    )
    sub.add_argument("--frames", type=positive, help=f"for an encoder: of each video, evenly spaced (default {FRAMES})")
    umt.add_arguments(sub)
    _add_weights(sub, "allow transformers to ask the hub", required=False)
    _add_common(sub, batch_size=4, schedule=umt.RETRIEVAL_SCHEDULE)

    sub = add("vqa", umt.vqa, "Accuracy of UMT's answers to questions on videos; the vision encoder is pruned.")
    umt.add_vqa_arguments(sub)
    _add_weights(sub, None, required=False)
    _add_common(sub, batch_size=4, schedule=umt.VQA_SCHEDULE)
    return parser


def _add_weights(sub: argparse.ArgumentParser, pretrained: str | None, required: bool) -> None:
    weights = sub.add_mutually_exclusive_group(required=required)
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="local .safetensors, .pth or .pt weights")
    if pretrained is not None:
        weights.add_argument("--pretrained", action="store_true", help=pretrained)
    weights.add_argument("--random-weights", action="store_true", help="to see that it runs")


def _add_common(sub: argparse.ArgumentParser, batch_size: int, schedule: str = arguments.SCHEDULE) -> None:
    arguments.add_schedule(sub, schedule)
    arguments.add_backend(sub, "eager")
    sub.add_argument("--batch-size", type=positive, default=batch_size, help=f"default {batch_size}")
    workers = min(4, os.cpu_count() or 1)
    sub.add_argument("--workers", type=count, default=workers, help=f"processes that read files (default {workers})")
    sub.add_argument("--dtype", choices=commands.DTYPES, default="float32")
    sub.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0; under torchrun cuda is each process's own")
    sub.add_argument("--limit", type=positive, help="so many files at most, evenly spaced")
    sub.add_argument(
        "--resume", type=Path, metavar="FILE", help="keep what is done there, and go on; a folder for retrieval --umt"
    )
    arguments.add_json(sub)


if __name__ == "__main__":
    sys.exit(main())
