"""A small ResNet on the handwritten digits, for what takes days on ImageNet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from bench.digits import Split, load_digits
from bench.train_digits import augment
from bench.training.loop import Data
from bench.training.recipe import Recipe

WEIGHTS = Path(__file__).parents[1] / "data" / "digits_resnet.safetensors"
CLASSES = 10
GRID = "0:4x4,1:1x1"  # 20 -> 16 and 8 -> 7: a third of the multiply-accumulates
QUICK = {"train": 320, "test": 200}

_SMALL = Recipe(batch=32, opt="adamw", weight_decay=0.05, ema_decay=0.99)
DENSE = replace(_SMALL, epochs=36, cooldown_epochs=4, warmup_epochs=3, lr=3e-3, min_lr=0.0)
FINETUNE = replace(_SMALL, epochs=12, cooldown_epochs=3, warmup_epochs=1, lr=1e-3, min_lr=1e-5)
FINETUNE_QUICK = replace(FINETUNE, epochs=1, cooldown_epochs=1, warmup_epochs=0, ema_decay=0.9)


def digits_resnet() -> nn.Module:
    """timm's ResNet-18 at an eighth of its width, untrained: [B, 1, 40, 40] -> logits [B, 10].

    The stem is three 3 x 3 convolutions, the first of stride 2, without the max pooling behind them, so the stages'
    maps are 20, 10, 5 and 3 cells wide.
    """
    block: Any = BasicBlock  # timm's annotation asks for an instance
    model = ResNet(block, (2, 2, 2, 2), CLASSES, in_chans=1, stem_type="deep", stem_width=4, channels=(8, 16, 32, 64))
    model.set_submodule("maxpool", nn.Identity())
    return model


def load_digits_resnet(weights: Path = WEIGHTS) -> nn.Module:
    """`digits_resnet` as `python -m bench finetune --train-dense` trained it, nothing pruned, in eval mode."""
    model = digits_resnet()
    model.load_state_dict(safetensors.torch.load_file(weights), strict=True)
    return model.eval()


class DigitBatches:
    """The digits of one split, [batch, 1, 40, 40] in 0..1, and their labels.

    The train split comes in random order, each image turned, scaled, sheared and shifted a little; what does not
    fill a batch is left for another epoch.
    """

    def __init__(self, split: Split, batch: int, limit: int | None = None) -> None:
        self.images, self.labels = (part[:limit] for part in load_digits(split))
        self.batch, self.augmented = batch, split == "train"

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch)
        return full if self.augmented else full + (rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.augmented:
            yield from zip(self.images.split(self.batch), self.labels.split(self.batch), strict=True)
            return
        order = torch.randperm(len(self.labels))
        for rows in order.split(self.batch)[: len(self)]:
            yield augment(self.images[rows], torch.default_generator), self.labels[rows]


def digits_data(recipe: Recipe, quick: bool = False) -> Data:
    """The digits' two splits; quick: the first 320 and 200 of them."""
    train, test = (QUICK["train"], QUICK["test"]) if quick else (None, None)
    return Data(DigitBatches("train", recipe.batch, train), DigitBatches("test", 4 * recipe.batch, test), CLASSES)
