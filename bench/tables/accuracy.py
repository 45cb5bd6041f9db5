"""Accuracy: on the user's pictures or videos where there are any, else on the digits."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from bench.digits import load_digits
from bench.tables.methods import Method
from bench.tables.options import Setting
from bench.tables.subjects import Subject

if TYPE_CHECKING:
    from bench.evaluate.retrieval import RetrievalScores

QUICK_DIGITS = 100
IMAGENET_CLASSES = 1000
Forwards = Sequence[tuple[Method, Callable[..., Any]]]
Scores = dict[str, dict[str, Any]]  # by label of the method


@torch.no_grad()
def on_digits(forward: Callable[..., Any], setting: Setting) -> dict[str, Any]:
    """Accuracy in percent on the digits' test images (596; the first 100 where quick)."""
    images, labels = load_digits("test")
    if setting.quick:
        images, labels = images[:QUICK_DIGITS], labels[:QUICK_DIGITS]
    torch.manual_seed(0)  # of random selection
    logits = forward(images.to(setting.device, setting.dtype)).cpu()
    right = (logits.argmax(1) == labels).double().mean()
    return {"accuracy": 100 * float(right), "images": len(labels), "data": "digits"}


def on_images(
    subject: Subject,
    model: nn.Module,
    forwards: Forwards,
    setting: Setting,
    args: argparse.Namespace,
    resume: Path | None,
) -> Scores:
    """Top-1 ("accuracy") and top-5 in percent, and drift from the first method, on the pictures of --imagenet.

    Args:
        subject: what the model is.
        model: of timm, which knows its own transform; in eval mode, on the device.
        forwards: the methods, applied to the model; all run on the same batches.
        resume: where an interrupted evaluation keeps what is done.
    """
    from bench.evaluate.images import evaluate_images

    transform = create_transform(**resolve_model_data_config(model, args={"input_size": subject.shape}))
    scores = evaluate_images(
        {method.label: forward for method, forward in forwards},
        forwards[0][0].label,
        args.imagenet,
        transform,
        classes=IMAGENET_CLASSES,
        batch_size=setting.batch_size or 64,
        workers=args.workers,
        device=setting.device,
        dtype=setting.dtype,
        resume=resume,
        limit=args.limit,
        identity=_identity(subject.name, forwards),
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
    forwards: Forwards,
    setting: Setting,
    args: argparse.Namespace,
    resume: Path | None,
) -> Scores:
    """R@1 ("accuracy"), R@5 and R@10 in percent, both ways and their means, on --videos and --captions.

    Args:
        subject: the dual encoder.
        model: its vision tower, in eval mode, on the device.
        forwards, resume: see `on_images`.
    """
    from bench.evaluate.encoders import load_encoder, with_vision
    from bench.evaluate.retrieval import evaluate_retrieval

    encoder: Any
    encoder, transform = load_encoder(subject.name, pretrained=args.pretrained)
    encoder = encoder.eval().to(setting.device, setting.dtype)
    scores = evaluate_retrieval(
        {method.label: with_vision(encoder, partial(_instead, forward)) for method, forward in forwards},
        args.videos,
        args.captions,
        transform,
        frames=args.frames,
        batch_size=setting.batch_size or 4,
        workers=args.workers,
        device=setting.device,
        dtype=setting.dtype,
        resume=resume,
        limit=args.limit,
        identity=_identity(subject.name, forwards),
    )
    return {
        label: {
            **retrieved(score),
            "data": str(args.videos),
        }
        for label, score in scores.items()
    }


def retrieved(score: RetrievalScores) -> dict[str, Any]:
    """Columns of a row: R@1 in the mean that reproduces the paper's base rows, and all else."""
    columns = asdict(score)
    return {"accuracy": score.arithmetic.r1, "images": columns.pop("videos"), **columns}


def _instead(forward: Any, _tower: nn.Module) -> Any:
    return forward


def _identity(name: str, forwards: Forwards) -> dict[str, Any]:
    schedules = {method.label: method.schedule and method.schedule.to_json() for method, _ in forwards}
    return {"model": name, "schedules": schedules, "options": {m.label: dict(m.options) for m, _ in forwards}}
