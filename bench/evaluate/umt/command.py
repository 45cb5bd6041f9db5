"""`python -m bench.evaluate retrieval --umt ...` and `vqa`: UMT whole, dense and pruned."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from bench.evaluate import printed
from bench.evaluate.journal import EvaluationError
from bench.evaluate.printed import DENSE, PRUNED
from bench.evaluate.ranks import Ranks
from bench.evaluate.umt.answers import CANDIDATES
from bench.evaluate.umt.datasets import DATASETS
from bench.evaluate.umt.retrieval import evaluate_umt_retrieval
from bench.evaluate.umt.tokens import Tokenizer, read_tokenizer
from bench.evaluate.umt.vqa import evaluate_vqa
from bench.models.umt_tasks import UMT_SIZES, UmtAnswering, UmtRetrieval, UmtSize, load_umt
from rs_compile import arguments, commands, optimize
from rs_compile.schedule import Schedule

RETRIEVAL_SCHEDULE, VQA_SCHEDULE = "0:0.8,1:0.8,2:0.8", "0:0.9,1:0.9,2:0.9"  # the paper's
_MEANS = "the arithmetic mean is what the paper's base rows are, though it calls them harmonic"
_PER_FRAME = (
    "similarity of the dense model: frame by frame, as UMT's own; of the pruned one: by the mean of what is left"
)
Model = TypeVar("Model", UmtRetrieval, UmtAnswering)


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """What retrieval with UMT takes beside the options of all evaluations."""
    sub.add_argument(
        "--text-config",
        type=Path,
        metavar="DIR",
        help="for UMT: bert-base-uncased's (b) or bert-large-uncased's (l) folder, or one with its vocab.txt",
    )
    sub.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help='for UMT: the data set\'s test file, [{"video": ..., "caption": ...}, ...]',
    )
    arguments.add_dataset(sub, list(DATASETS), "for UMT: that of the videos")
    sub.add_argument(
        "--per-frame", action="store_true", help="for UMT: pool as UMT itself does where nothing is pruned"
    )


def retrieval(args: argparse.Namespace) -> printed.Result:
    """Runs retrieval with UMT, and prints it."""
    _need(args, "text_config", "annotations", "dataset")
    size = UMT_SIZES[args.umt]
    if args.captions or args.frames:
        raise EvaluationError(
            f"--captions and --frames go with --encoder; UMT takes --annotations, and {size.frames} frames"
        )
    device, dtype = Ranks.join().device(commands.device_of(args.device)), commands.DTYPES[args.dtype]
    model, tokenizer = loaded(UmtRetrieval, size, args.checkpoint, args.text_config)
    model = model.to(device, dtype)
    scores = evaluate_umt_retrieval(
        model,
        _encoders(model.vision_encoder.encoder, args),
        tokenizer,
        DATASETS[args.dataset],
        args.videos,
        args.annotations,
        per_frame=args.per_frame,
        cache=args.resume,
        identity={PRUNED: printed.identity(args)},
        **printed.settings(args, device, dtype),
    )
    rows: list[list[str]] = []
    for name, score in scores.items():
        rows += printed.recall_rows(name, score)
        rows += [[name, "mean, not re-ranked", *(printed.digits(v, 1) for v in score.by_similarity.arithmetic.all)]]
    one, title = scores[DENSE], f"UMT-{args.umt.upper()} on {args.dataset}"
    title += f", {one.videos} videos of {args.videos}, {one.captions} texts, {printed.pruning(args)}"
    lines = [
        *printed.notes(args),
        _MEANS,
    ]
    if args.per_frame:
        lines.append(_PER_FRAME)
    return scores, printed.table(title, rows, printed.RECALL_HEADS, lines), _about(args)


def add_vqa_arguments(sub: argparse.ArgumentParser) -> None:
    """What question answering takes beside the options of all evaluations."""
    sub.add_argument("--umt", choices=UMT_SIZES, required=True, help="UMT-B or UMT-L, whole")
    sub.add_argument("--text-config", type=Path, metavar="DIR", help="as of retrieval")
    sub.add_argument("--videos", type=Path, required=True, metavar="DIR", help="the folder of the video files")
    sub.add_argument(
        "--annotations",
        type=Path,
        required=True,
        metavar="FILE",
        help='the test file, [{"video": ..., "question": ..., "answer": ...}, ...]',
    )
    sub.add_argument("--answers", type=Path, required=True, metavar="FILE", help='all candidates, ["yes", "no", ...]')
    sub.add_argument(
        "--candidates",
        type=arguments.positive,
        default=CANDIDATES,
        metavar="N",
        help=f"so many are ranked in the second stage (default {CANDIDATES}, as published)",
    )


def vqa(args: argparse.Namespace) -> printed.Result:
    """Runs question answering with UMT, and prints it."""
    _need(args, "text_config")
    device, dtype = Ranks.join().device(commands.device_of(args.device)), commands.DTYPES[args.dtype]
    model, tokenizer = loaded(UmtAnswering, UMT_SIZES[args.umt], args.checkpoint, args.text_config)
    model = model.to(device, dtype)
    scores = evaluate_vqa(
        model,
        _encoders(model.vision_encoder.encoder, args),
        tokenizer,
        args.videos,
        args.annotations,
        args.answers,
        candidates=args.candidates,
        resume=args.resume,
        identity=printed.identity(args),
        **printed.settings(args, device, dtype),
    )
    one, lines = scores[DENSE], printed.notes(args)
    if one.unlisted:
        lines.append(f"{one.unlisted} of {one.questions} questions have an answer that is not in {args.answers}: wrong")
    if one.unread:
        lines.append(f"{one.unread} of {one.questions} questions are on videos that could not be read: wrong")
    title = f"UMT-{args.umt.upper()}, {one.questions} questions on {one.videos} videos of {args.videos}, "
    rows = [[name, printed.digits(score.accuracy, 2)] for name, score in scores.items()]
    return scores, printed.table(title + printed.pruning(args), rows, ["model", "accuracy %"], lines), _about(args)


def loaded(kind: type[Model], size: UmtSize, checkpoint: Path | None, text_config: Path) -> tuple[Model, Tokenizer]:
    """A model in eval mode, fp32, and its tokenizer; without a checkpoint its weights are random, always the same."""
    tokenizer = read_tokenizer(text_config, size.text)  # what is wrong with it shows in a second
    torch.manual_seed(0)
    model = kind(size).eval()
    if checkpoint is not None:
        load_umt(model, checkpoint)
    return model, tokenizer


def _encoders(dense: nn.Module, args: argparse.Namespace) -> Mapping[str, Any]:
    pruned = optimize(dense, Schedule.of(args.schedule), backend=args.backend, token_outputs="compact")
    return {DENSE: dense, PRUNED: pruned}


def _need(args: argparse.Namespace, *names: str) -> None:
    absent = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is None]
    if args.checkpoint is None and not args.random_weights:
        absent.append("--checkpoint (or --random-weights)")
    if absent:
        raise EvaluationError(f"UMT takes {', '.join(absent)} too")


def _about(args: argparse.Namespace) -> dict[str, Any]:
    paths = {key: str(value) for key, value in vars(args).items() if isinstance(value, Path) and key != "resume"}
    chosen = {key: getattr(args, key) for key in ("umt", "dataset", "per_frame", "candidates") if hasattr(args, key)}
    return {**chosen, **paths, **printed.about(args)}
