"""The demo that needs no download: handwritten digits, and a small ViT trained on them.

scikit-learn's wheel carries 1797 real 8x8 scans (the UCI optical digits' test set). Each is enlarged to
24x24 and put at a seeded random place on an empty 40x40 canvas, a whole number of patches from the edges.
With patches of 4 that is 100 patch tokens and a class token; the digit lies within 36 of them, and the other
64 see nothing: there is something to prune.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

Split = Literal["train", "test"]

CANVAS = 40  # pixels a side
DIGIT = 24  # pixels a side, of the enlarged scan
PATCH = 4
PLACES = (CANVAS - DIGIT) // PATCH + 1  # along each side: 5, so 25 in all
SPLIT_SEED = 0
PLACE_SEED = 1
TEST_SHARE = 3  # one in three of each class is a test image


def load_digits(split: Split) -> tuple[Tensor, Tensor]:
    """The digits on their canvases; the same bytes on every call.

    Args:
        split: "train" (1201 images) or "test" (596, a third of each class). The writers of the scans are
            not recorded, so both halves share writers.

    Returns:
        images: float32 [n, 1, 40, 40] in 0..1, background exactly 0.
        labels: int64 [n].

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: no such split.
    """
    scans, labels, index = load_scans(split)
    # drawn for all 1797, so that an image's place does not depend on the split
    corners = np.random.RandomState(PLACE_SEED).randint(0, PLACES, size=(_count(), 2))
    return place(enlarge(scans), torch.from_numpy(corners)[index]), labels


def load_scans(split: Split) -> tuple[Tensor, Tensor, Tensor]:
    """The scans as they come: images float32 [n, 1, 8, 8] in 0..1, labels int64 [n], and their indices
    int64 [n] in scikit-learn's data set. Arguments and errors as in `load_digits`."""
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; it is 'train' or 'test'")
    images, labels = _sklearn_digits()
    # RandomState, because its stream is frozen across numpy versions
    random = np.random.RandomState(SPLIT_SEED)
    chosen: list[np.ndarray] = []
    for label in range(10):
        members = random.permutation(np.flatnonzero(labels == label))
        tests = len(members) // TEST_SHARE
        chosen.append(members[:tests] if split == "test" else members[tests:])
    index = np.sort(np.concatenate(chosen))
    scans = torch.from_numpy(images[index] / 16.0).float().unsqueeze(1)
    return scans, torch.from_numpy(labels[index]).long(), torch.from_numpy(index).long()


def enlarge(scans: Tensor) -> Tensor:
    """Bilinear: [n, 1, 8, 8] -> [n, 1, 24, 24]."""
    return F.interpolate(scans, size=(DIGIT, DIGIT), mode="bilinear", align_corners=False)


def place(digits: Tensor, corners: Tensor) -> Tensor:
    """Puts digits [n, 1, 24, 24] on empty canvases [n, 1, 40, 40]; corners int64 [n, 2] are the rows and
    columns of their upper left patches, 0 to 4."""
    canvases = digits.new_zeros(len(digits), 1, CANVAS, CANVAS)
    for canvas, digit, (top, left) in zip(canvases, digits, (PATCH * corners).tolist(), strict=True):
        canvas[:, top : top + DIGIT, left : left + DIGIT] = digit
    return canvases


def digits_vit() -> nn.Module:
    """timm's VisionTransformer, untrained: [B, 1, 40, 40] -> logits [B, 10]; 101 tokens, width 96, depth 6,
    3 heads, class token. MLP ratio 2 keeps the fp32 weights under 2 MB."""
    return VisionTransformer(
        img_size=CANVAS,
        patch_size=PATCH,
        in_chans=1,
        num_classes=10,
        embed_dim=96,
        depth=6,
        num_heads=3,
        mlp_ratio=2.0,
    )


def load_pretrained_digits_vit() -> nn.Module:
    """`digits_vit` with the weights that come with this package, in eval mode.

    They were made by `bench/train_digits.py`, without any token pruning or dropping.
    """
    weights = files("rs_compile").joinpath("data", "digits_vit.safetensors").read_bytes()
    model = digits_vit()
    model.load_state_dict(safetensors.torch.load(weights), strict=True)
    return model.eval()


def _sklearn_digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed: pip install 'rs-compile[demo]'",
            name="sklearn",
        ) from error
    digits = datasets.load_digits()
    return digits.images, digits.target


def _count() -> int:
    return len(_sklearn_digits()[1])
