"""Accuracy: on the user's pictures where there are any, else on the digits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from rs_compile.digits import load_digits

Forward = Callable[..., Any]
QUICK_DIGITS = 100
IMAGENET_CLASSES = 1000


@torch.no_grad()
def on_digits(forward: Forward, quick: bool) -> dict[str, Any]:
    """Accuracy in percent on the digits' test images (596; the first 100 where quick)."""
    images, labels = load_digits("test")
    if quick:
        images, labels = images[:QUICK_DIGITS], labels[:QUICK_DIGITS]
    torch.manual_seed(0)  # of random selection
    right = (forward(images).argmax(1) == labels).double().mean()
    return {"accuracy": 100 * float(right), "images": len(labels), "data": "digits"}


def on_images(
    model: nn.Module,
    forwards: Mapping[str, Forward],
    reference: str,
    folder: Path,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    dtype: torch.dtype,
    resume: Path | None,
    limit: int | None,
) -> dict[str, dict[str, Any]]:
    """Accuracy (top-1, percent), top-5 and drift from `reference` on a folder of pictures, by name of the forward.

    Args:
        model: a timm model, which knows its own transform.
        forwards: images [B, 3, H, W] -> logits [B, 1000].
        reference: the name of the dense one.
        folder: a folder a class, or pictures without labels.
        batch_size, workers, device, dtype, resume, limit: see `bench.evaluate.images.evaluate_images`.
    """
    from bench.evaluate.images import evaluate_images

    transform = create_transform(**resolve_model_data_config(model))
    scores = evaluate_images(
        forwards,
        reference,
        folder,
        transform,
        classes=IMAGENET_CLASSES,
        batch_size=batch_size,
        workers=workers,
        device=device,
        dtype=dtype,
        resume=resume,
        limit=limit,
    )
    return {
        name: {
            "accuracy": score.top1,
            "top5": score.top5,
            "agreement": score.agreement,
            "cosine": score.cosine,
            "kl": score.kl,
            "images": score.images,
            "skipped": len(score.skipped),
            "data": str(folder),
        }
        for name, score in scores.items()
    }
