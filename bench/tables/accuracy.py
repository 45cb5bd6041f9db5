"""Accuracy: on the user's pictures or videos where there are any, else on the digits."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from bench.tables.methods import Method
from bench.tables.options import Setting
from bench.tables.results import UsageError
from bench.tables.subjects import Subject
from rs_compile.digits import load_digits

QUICK_DIGITS = 100
IMAGENET_CLASSES = 1000
Scores = dict[str, dict[str, Any]]  # by label of the method


@torch.no_grad()
def on_digits(forward: Callable[..., Any], quick: bool) -> dict[str, Any]:
    """Accuracy in percent on the digits' test images (596; the first 100 where quick)."""
    images, labels = load_digits("test")
    if quick:
        images, labels = images[:QUICK_DIGITS], labels[:QUICK_DIGITS]
    torch.manual_seed(0)  # of random selection
    right = (forward(images).argmax(1) == labels).double().mean()
    return {"accuracy": 100 * float(right), "images": len(labels), "data": "digits"}


def on_images(
    subject: Subject,
    model: nn.Module,
    methods: Sequence[Method],
    setting: Setting,
    args: argparse.Namespace,
    resume: Path | None,
) -> Scores:
    """Top-1 ("accuracy") and top-5 in percent, and drift from the first method, on the pictures of --imagenet.

    Args:
        subject: what the model is.
        model: of timm, which knows its own transform; in eval mode, on the device.
        methods: run on the same batches.
        resume: where an interrupted evaluation keeps what is done.
    """
    from bench.evaluate.images import evaluate_images

    transform = create_transform(**resolve_model_data_config(model, args={"input_size": subject.shape}))
    scores = evaluate_images(
        {m.label: m.apply(model, setting.backend) for m in methods},
        methods[0].label,
        args.imagenet,
        transform,
        classes=IMAGENET_CLASSES,
        batch_size=setting.batch_size or 64,
        workers=args.workers,
        device=setting.device,
        dtype=setting.dtype,
        resume=resume,
        limit=args.limit,
        identity=_identity(subject.name, methods),
    )
    return {
        label: {
            "accuracy": score.top1,
            "top5": score.top5,
            "agreement": score.agreement,
            "cosine": score.cosine,
            "kl": score.kl,
            "images": score.images,
            "skipped": [asdict(skipped) for skipped in score.skipped],
            "data": str(args.imagenet),
        }
        for label, score in scores.items()
    }


def on_videos(
    subject: Subject,
    model: nn.Module,
    methods: Sequence[Method],
    setting: Setting,
    args: argparse.Namespace,
    resume: Path | None,
) -> Scores:
    """R@1 ("accuracy"), R@5 and R@10 in percent, harmonic means of both directions, on --videos and --captions.

    Args:
        subject: one that --texts has text features for, or the dual encoder.
        model: its vision encoder, in eval mode, on the device.
        methods, resume: see `on_images`.
    """
    from bench.evaluate.encoders import UmtEncoder, load_encoder, umt_transform, with_vision
    from bench.evaluate.retrieval import evaluate_retrieval

    if args.captions is None:
        raise UsageError("--videos needs --captions FILE, which says what is to be seen in them")
    encoder: Any
    name, texts = subject.name, dict(args.texts)
    if name == getattr(args, "dual_encoder", None):
        encoder, transform = load_encoder(name, pretrained=args.pretrained)
        frames = args.frames
    elif name not in texts:
        raise UsageError(
            f"{name} has no text encoder here; pass its text features, --texts {name}=FILE, or leave {name} out"
        )
    elif name not in dict(args.checkpoint) and not args.quick:
        raise UsageError(f"without its weights {name} retrieves nothing; pass --checkpoint {name}=FILE")
    else:
        _, frames, side, _ = subject.shape
        encoder, transform = UmtEncoder(model, texts[name]), umt_transform(side)
    encoder = encoder.eval().to(setting.device, setting.dtype)
    scores = evaluate_retrieval(
        {m.label: with_vision(encoder, cast(Any, partial(m.apply, backend=setting.backend))) for m in methods},
        args.videos,
        args.captions,
        transform,
        frames=frames,
        batch_size=setting.batch_size or 4,
        workers=args.workers,
        device=setting.device,
        dtype=setting.dtype,
        resume=resume,
        limit=args.limit,
        identity=_identity(subject.name, methods),
    )
    return {
        label: {
            "accuracy": score.harmonic.r1,
            "harmonic": asdict(score.harmonic),
            "text_to_video": asdict(score.text_to_video),
            "video_to_text": asdict(score.video_to_text),
            "images": score.videos,
            "skipped": [asdict(skipped) for skipped in score.skipped],
            "data": str(args.videos),
        }
        for label, score in scores.items()
    }


def _identity(name: str, methods: Sequence[Method]) -> dict[str, Any]:
    schedules = {m.label: m.schedule and m.schedule.to_json() for m in methods}
    return {"model": name, "schedules": schedules, "options": {m.label: dict(m.options) for m in methods}}
