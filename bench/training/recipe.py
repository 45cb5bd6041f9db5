"""What a training run is made of, apart from model and data."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, get_type_hints

from passes.graph.base import CompileError
from passes.graph.codes import Code


class TrainingError(CompileError):
    """A recipe, data or a checkpoint that training cannot go on with; says what to do."""

    family = Code.COMMAND


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """timm's training script by its own defaults, for as long as the paper fine-tunes: 100 epochs, the last 10 of
    them cooling down (section 4.2). What the paper leaves out (optimizer, learning rate, augmentation) is timm's;
    `min_lr` is that of the versions which cooled down by default: at today's 0 a cool-down would train nothing.

    The learning rate follows a cosine from `lr` to `min_lr` over `epochs`, the warm-up taken off their beginning,
    and stays at `min_lr` for `cooldown_epochs` more.

    Raises:
        TrainingError: a value out of its range.
    """

    epochs: int = _option(90, "epochs of the cosine, warm-up included")
    cooldown_epochs: int = _option(10, "epochs after it, at the lowest learning rate")
    warmup_epochs: int = _option(5, "epochs over which the learning rate rises")
    batch: int = _option(256, "images of an update")
    opt: str = _option("sgd", "optimizer, by timm's name")
    lr: float = _option(0.1, "highest learning rate, not scaled by the batch")
    warmup_lr: float = _option(1e-5, "learning rate that the warm-up starts from")
    min_lr: float = _option(1e-6, "lowest learning rate, that of the cool-down")
    weight_decay: float = _option(2e-5, "of matrices; biases and norms have none")
    ema_decay: float = _option(0.9998, "of the weights' moving average, which is what is evaluated")
    smoothing: float = _option(0.1, "of labels")
    mixup: float = _option(0.0, "alpha of mixup")
    cutmix: float = _option(0.0, "alpha of cutmix")
    auto_augment: str = _option("", "timm's name of a policy, such as rand-m7-mstd0.5-inc1")
    color_jitter: float = _option(0.4, "strength; unused beside auto-augment")
    erase: float = _option(0.0, "probability of random erasing")
    seed: int = _option(0, "of shuffling and augmentation")

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("cooldown_epochs", 0), ("warmup_epochs", 0), ("batch", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise TrainingError(f"{_flag(name)} is {value}; write at least {least}")
        for name in ("lr", "warmup_lr", "min_lr", "weight_decay", "mixup", "cutmix", "color_jitter"):
            if not (value := getattr(self, name)) >= 0:
                raise TrainingError(f"{_flag(name)} is {value}; write at least 0")
        for name in ("ema_decay", "smoothing", "erase"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise TrainingError(f"{_flag(name)} is {value}; write a number from 0 to below 1")
        if self.warmup_epochs >= self.epochs:
            raise TrainingError(
                f"--warmup-epochs {self.warmup_epochs} leaves nothing of --epochs {self.epochs}; warm up for fewer"
            )
        if self.mixes and self.batch % 2:
            raise TrainingError(f"--batch is {self.batch}; mixup and cutmix pair the images, write an even number")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def all_epochs(self) -> int:
        """Of the whole run, cool-down included."""
        return self.epochs + self.cooldown_epochs


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for every field of a recipe; what is not given is left to the preset."""
    types = get_type_hints(Recipe)
    group = parser.add_argument_group("recipe", "what is not given is timm's default, and on the digits a preset")
    for item in fields(Recipe):
        group.add_argument(_flag(item.name), type=types[item.name], metavar=_metavar(item), help=item.metadata["help"])


def recipe_from(args: argparse.Namespace, preset: Recipe) -> Recipe:
    """The preset with what the command line gave."""
    given: Mapping[str, Any] = {f.name: v for f in fields(Recipe) if (v := getattr(args, f.name)) is not None}
    return replace(preset, **given)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _metavar(item: Field[Any]) -> str:
    return "NAME" if isinstance(item.default, str) else "N" if isinstance(item.default, int) else "X"
