"""`python -m bench.evaluate images | retrieval`: a dense model and its pruned stand-in on your own data.

Results on stdout, progress on stderr. Under `torchrun --nproc-per-node N -m bench.evaluate ...` every process takes a
share. Exit codes: 0 done, 1 done, but files could not be read, 2 something that the user can mend (the message
says how), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from timm.data import create_transform, resolve_model_data_config

from bench.evaluate.encoders import Transform, UmtEncoder, load_encoder, umt_transform, with_vision
from bench.evaluate.images import ImageScores, evaluate_images
from bench.evaluate.journal import EvaluationError
from bench.evaluate.ranks import Ranks
from bench.evaluate.retrieval import RetrievalScores, evaluate_retrieval
from bench.evaluate.sweep import skipped_text
from bench.models import umt
from passes.graph.base import CompileError
from rs_compile import arguments, commands, models, optimize
from rs_compile.arguments import count, positive
from rs_compile.schedule import Schedule

DENSE, PRUNED = "dense", "pruned"
KS = (1, 5, 10)


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


Result = tuple[Mapping[str, ImageScores] | Mapping[str, RetrievalScores], str, dict[str, Any]]


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
        identity={"model": args.model, **_identity(args)},
        colours="L" if size[0] == 1 else "RGB",
        **_settings(args, device, dtype),
    )
    rows = [
        [name, *(_digits(v, 2) for v in (s.top1, s.top5, s.agreement)), _digits(s.cosine, 4), _digits(s.kl, 4)]
        for name, s in scores.items()
    ]
    heads = ["model", "top-1 %", "top-5 %", "agreement %", "cosine", "KL, nats"]
    one = scores[DENSE]
    title = f"{args.model}, {one.images} pictures of {args.imagenet}, {args.dtype}; pruned: {_shown(args)}"
    notes = _notes(args) + (["without class folders there are no labels: no accuracy"] if one.top1 is None else [])
    return (
        scores,
        _table(title, rows, heads, notes),
        {"model": args.model, "images": str(args.imagenet), **_about(args)},
    )


def _retrieval(args: argparse.Namespace) -> Result:
    device, dtype = Ranks.join().device(commands.device_of(args.device)), commands.DTYPES[args.dtype]
    encoder, transform = _encoder(args)
    encoder = encoder.to(device, dtype)
    schedule = Schedule.of(args.schedule)
    pruned = with_vision(encoder, lambda tower: optimize(tower, schedule, backend=args.backend))
    scores = evaluate_retrieval(
        {DENSE: encoder, PRUNED: pruned},
        args.videos,
        args.captions,
        transform,
        frames=args.frames,
        identity={"encoder": args.encoder, **_identity(args)},
        **_settings(args, device, dtype),
    )
    rows: list[list[str]] = []
    for name, s in scores.items():
        ways = {"text to video": s.text_to_video, "video to text": s.video_to_text, "harmonic mean": s.harmonic}
        rows += [[name, way, *(_digits(v, 1) for v in (r.r1, r.r5, r.r10))] for way, r in ways.items()]
    heads = ["model", "way", *(f"R@{k} %" for k in KS)]
    one = scores[DENSE]
    title = (
        f"{args.encoder}, {one.videos} videos of {args.videos}, {one.captions} captions, {args.frames} frames, "
        f"{args.dtype}; pruned: {_shown(args)}"
    )
    about = {"encoder": args.encoder, "videos": str(args.videos), "captions": str(args.captions), **_about(args)}
    return scores, _table(title, rows, heads, _notes(args)), about


def _encoder(args: argparse.Namespace) -> tuple[Any, Transform]:
    if args.encoder not in umt.SIZES:
        if args.checkpoint or args.texts:
            raise EvaluationError(f"--checkpoint and --texts go with UMT's encoders, {' and '.join(umt.SIZES)}")
        return load_encoder(args.encoder, pretrained=args.pretrained, random_weights=args.random_weights)
    if args.texts is None or not (args.checkpoint or args.random_weights):
        raise EvaluationError(f"{args.encoder} takes --checkpoint FILE and, made by its text encoder, --texts FILE")
    torch.manual_seed(0)
    vision = umt.umt(args.encoder, frames=args.frames)
    if args.checkpoint:
        umt.load_checkpoint(vision, args.checkpoint)
    return UmtEncoder(vision, args.texts).eval(), umt_transform()


def _settings(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "batch_size": args.batch_size,
        "workers": args.workers,
        "device": device,
        "dtype": dtype,
        "resume": args.resume,
        "limit": args.limit,
    }


def _identity(args: argparse.Namespace) -> dict[str, Any]:
    return {"schedule": json.loads(Schedule.of(args.schedule).to_json()), "backend": args.backend}


def _about(args: argparse.Namespace) -> dict[str, Any]:
    return {**_identity(args), "dtype": args.dtype, "random_weights": args.random_weights}


def _shown(args: argparse.Namespace) -> str:
    return str(args.schedule).strip()


def _notes(args: argparse.Namespace) -> list[str]:
    return ["random weights: this shows that it runs, not what the model can do"] if args.random_weights else []


def _table(title: str, rows: list[list[str]], heads: list[str], notes: list[str]) -> str:
    align = ["left" if head in ("model", "way") else "right" for head in heads]
    return "\n".join([title, tabulate(rows, heads, disable_numparse=True, colalign=align), *notes])


def _digits(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


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
        "retrieval", _retrieval, "R@1/5/10 of a dual encoder whose vision tower is pruned, on a folder of videos."
    )
    sub.add_argument(
        "--encoder", required=True, help="a folder as transformers' save_pretrained makes it, umt_b or umt_l"
    )
    sub.add_argument("--videos", type=Path, required=True, metavar="DIR", help="the folder of the video files")
    sub.add_argument(
        "--captions",
        type=Path,
        required=True,
        metavar="FILE",
        help='{"video.mp4": ["a caption", ...]} or [{"video": ..., "caption": ...}, ...]',
    )
    sub.add_argument("--texts", type=Path, metavar="FILE", help="for UMT: its text features as .safetensors")
    sub.add_argument("--frames", type=positive, default=12, help="of each video, evenly spaced (default 12)")
    _add_weights(sub, "allow transformers to ask the hub", required=False)
    _add_common(sub, batch_size=4)
    return parser


def _add_weights(sub: argparse.ArgumentParser, pretrained: str, required: bool) -> None:
    weights = sub.add_mutually_exclusive_group(required=required)
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="local .safetensors, .pth or .pt weights")
    weights.add_argument("--pretrained", action="store_true", help=pretrained)
    weights.add_argument("--random-weights", action="store_true", help="to see that it runs")


def _add_common(sub: argparse.ArgumentParser, batch_size: int) -> None:
    arguments.add_schedule(sub)
    arguments.add_backend(sub, "eager")
    sub.add_argument("--batch-size", type=positive, default=batch_size, help=f"default {batch_size}")
    workers = min(4, os.cpu_count() or 1)
    sub.add_argument("--workers", type=count, default=workers, help=f"processes that read files (default {workers})")
    sub.add_argument("--dtype", choices=commands.DTYPES, default="float32")
    sub.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0; under torchrun cuda is each process's own")
    sub.add_argument("--limit", type=positive, help="so many files at most, evenly spaced")
    sub.add_argument("--resume", type=Path, metavar="FILE", help="keep what is done there, and go on from it")
    arguments.add_json(sub)


if __name__ == "__main__":
    sys.exit(main())
