"""Accuracy without a download: handwritten digits, and a small ViT trained on them.

scikit-learn's wheel carries 1797 real 8x8 scans (the UCI optical digits' test set). Each is enlarged to
40x40; with patches of 4 that is 100 patch tokens and a class token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

Split = Literal["train", "test"]

WEIGHTS = Path(__file__).parent / "data" / "digits_vit.safetensors"
SIDE = 40  # pixels
PATCH = 4
SPLIT_SEED = 0
TEST_SHARE = 3  # one in three of each class is a test image


def load_digits(split: Split) -> tuple[Tensor, Tensor]:
    """The digits, enlarged bilinearly; the same bytes on every call.

    Args:
        split: "train" (1201 images) or "test" (596, a third of each class). The writers of the scans are
            not recorded, so both halves share writers.

    Returns:
        images: float32 [n, 1, 40, 40] in 0..1, background 0.
        labels: int64 [n].

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: no such split.
    """
    scans, labels = _sklearn_digits()
    index = split_rows(split)
    images = torch.from_numpy(scans[index] / 16.0).float().unsqueeze(1)
    enlarged = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return enlarged, torch.from_numpy(labels[index]).long()


def split_rows(split: Split) -> np.ndarray:
    """Which of scikit-learn's digits are in a split, [n]; see `load_digits`."""
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; it is 'train' or 'test'")
    _, labels = _sklearn_digits()
    # RandomState, because its stream is frozen across numpy versions
    random = np.random.RandomState(SPLIT_SEED)
    chosen: list[np.ndarray] = []
    for label in range(10):
        members = random.permutation(np.flatnonzero(labels == label))
        tests = len(members) // TEST_SHARE
        chosen.append(members[:tests] if split == "test" else members[tests:])
    return np.sort(np.concatenate(chosen))


def digits_vit() -> nn.Module:
    """timm's VisionTransformer, untrained: [B, 1, 40, 40] -> logits [B, 10]; 101 tokens, width 64, depth 6,
    2 heads, MLP ratio 2, class token; fp32 weights of under 1 MB."""
    return VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=6,
        num_heads=2,
        mlp_ratio=2.0,
    )


def load_pretrained_digits_vit() -> nn.Module:
    """`digits_vit` with the weights that lie beside this file, in eval mode.

    They were made by `bench/train_digits.py`, without any token pruning or dropping.
    """
    model = digits_vit()
    model.load_state_dict(safetensors.torch.load_file(WEIGHTS), strict=True)
    return model.eval()


def _sklearn_digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn",
            name="sklearn",
        ) from error
    digits = datasets.load_digits()
    return digits.images, digits.target
