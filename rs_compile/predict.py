"""A dense model and its pruned stand-in on the same images, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from rs_compile.models import ModelError, class_names
from rs_compile.optimize import OptimizedModel

TOP = 5
_BATCH = 16
_NAME_WIDTH = 32  # columns; WordNet's lemmas list every synonym


@dataclass(frozen=True)
class Guess:
    """A class, by index and name, and its probability."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """One image's best classes, best first, of both models.

    Args:
        image: its file.
        dense, pruned: up to five guesses each; empty for a model without classifier.
        cosine: cosine similarity of the two outputs.
    """

    image: str
    dense: tuple[Guess, ...]
    pruned: tuple[Guess, ...]
    cosine: float

    @property
    def agrees(self) -> bool:
        """Whether both name the same class first."""
        return bool(self.dense) and self.dense[0].index == self.pruned[0].index

    @property
    def shared(self) -> int:
        """How many of the classes listed are listed by both."""
        return len({g.index for g in self.dense} & {g.index for g in self.pruned})


@dataclass(frozen=True)
class Predictions:
    """What both models say about some images, and the multiply-accumulates of one image."""

    images: tuple[Prediction, ...]
    macs_dense: int
    macs: int

    def __str__(self) -> str:
        macs = f"GMACs an image: {self.macs_dense / 1e9:.3f} dense, {self.macs / 1e9:.3f} pruned"
        if not any(p.dense for p in self.images):
            rows = [[p.image, f"{p.cosine:.4f}"] for p in self.images]
            table = tabulate(rows, ["image", "cosine of dense and pruned features"], disable_numparse=True)
            return f"{table}\nthe model has no classifier: its features are compared\n{macs}"
        rows = []
        for p in self.images:
            for rank, (dense, pruned) in enumerate(zip(p.dense, p.pruned, strict=True)):
                rows.append([p.image if rank == 0 else "", *_shown(dense), *_shown(pruned)])
        heads = ["image", "dense", "%", "pruned", "%"]
        table = tabulate(rows, heads, disable_numparse=True, colalign=("left", "left", "right", "left", "right"))
        return f"{table}\n{self.agreement()}\n{macs}"

    def agreement(self) -> str:
        """How far both agree, in a line."""
        same = sum(p.agrees for p in self.images)
        listed = sum(len(p.dense) for p in self.images)
        shared = sum(p.shared for p in self.images)
        return (
            f"agreement: the same first class on {same} of {len(self.images)} images, "
            f"{shared} of the {listed} classes listed in both"
        )

    def to_json(self) -> str:
        """The same content."""
        images = [asdict(p) | {"agrees": p.agrees, "shared": p.shared} for p in self.images]
        return json.dumps({"images": images, "macs_dense": self.macs_dense, "macs": self.macs}, indent=2)


@torch.no_grad()
def predict(model: nn.Module, optimized: OptimizedModel, names: Sequence[str], images: Tensor) -> Predictions:
    """Runs both on `images` [n, C, H, W]; `names` are the n files.

    Raises:
        ModelError: the model's output is not [n, K].
        CompileError: the model cannot be captured or pruned.
    """
    pairs = [(model(chunk), optimized(chunk)) for chunk in images.split(_BATCH)]
    if not all(isinstance(out, Tensor) and out.dim() == 2 for out in pairs[0]):
        raise ModelError("the model's output is not one row an image; pass a model with a classifier or pooling")
    dense, pruned = (torch.cat([pair[i] for pair in pairs]).float() for i in (0, 1))
    cosine = torch.nn.functional.cosine_similarity(dense, pruned).tolist()
    classes = int(getattr(model, "num_classes", dense.shape[1]))
    found: list[list[tuple[Guess, ...]]] = [[()] * len(names), [()] * len(names)]
    if classes > 0:
        labels = class_names(classes)
        found = [[_best(row, labels) for row in logits.softmax(1)] for logits in (dense, pruned)]
    report = optimized.report()
    rows = zip(names, *found, cosine, strict=True)
    return Predictions(tuple(Prediction(*row) for row in rows), report.macs_dense, report.macs)


def _best(probabilities: Tensor, labels: Sequence[str]) -> tuple[Guess, ...]:
    values, indices = probabilities.topk(min(TOP, len(probabilities)))
    pairs: Any = zip(indices.tolist(), values.tolist(), strict=True)
    return tuple(Guess(i, labels[i], p) for i, p in pairs)


def _shown(guess: Guess) -> tuple[str, str]:
    name = guess.name if len(guess.name) <= _NAME_WIDTH else guess.name[: _NAME_WIDTH - 1] + "…"
    return name, f"{100 * guess.probability:.1f}"
