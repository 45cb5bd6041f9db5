"""How far outputs are from the dense model's, a number a sample, without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def shown(value: float, error: float | None = None) -> str:
    """With five decimals, its standard error behind it; where these would show nothing, as a power of ten."""
    form = ".1e" if 0 < value < 5e-5 else ".5f"
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form}}"


def apart(found: Tensor, wanted: Tensor) -> Tensor:
    """1 - cosine over the channels of one output, mean over positions: [B]. Maps are [B, C, H, W]."""
    near = torch.cosine_similarity(found.double(), wanted.double(), dim=1 if wanted.dim() == 4 else -1)
    return 1 - near.reshape(len(near), -1).mean(1)


def cosine(outputs: Any, dense: Any) -> Tensor:
    """1 - cosine over the channels, mean over positions and over the outputs that were asked for: [B]."""
    found = floats(outputs)  # optimize(outputs=...) leaves the others out
    means = [apart(found[place], wanted) for place, wanted in floats(dense).items() if place in found]
    return torch.stack(means).mean(0)


def divergence(outputs: Tensor, dense: Tensor) -> Tensor:
    """KL(dense || outputs) of logits [B, ..., K], in nats, mean over positions: [B]."""
    found, wanted = outputs.double().log_softmax(-1), dense.double().log_softmax(-1)
    apart = (wanted.exp() * (wanted - found)).sum(-1)
    return apart.reshape(len(apart), -1).mean(1)


def logits_of(model: nn.Module, dense: Any) -> Callable[[Any], Tensor] | None:
    """Picks the logits: an output of that name, or one row a sample that is as long as the model has classes."""
    if isinstance(dense, Mapping) and isinstance(dense.get("logits"), Tensor) and dense["logits"].dim() == 2:
        return lambda outputs: outputs["logits"]
    classes = getattr(model, "num_classes", None) or getattr(getattr(model, "fc", None), "out_features", None)
    if isinstance(dense, Tensor) and dense.dim() == 2 and dense.shape[1] == classes and classes > 1:
        return lambda outputs: outputs
    return None


def floats(outputs: Any) -> dict[Any, Tensor]:
    """Tensors of floats with a channel dimension, by their place."""
    if isinstance(outputs, Mapping):
        outputs = dict(outputs)
    elif is_dataclass(outputs) and not isinstance(outputs, type):
        outputs = {f.name: getattr(outputs, f.name) for f in fields(outputs)}
    leaves, _ = pytree.tree_flatten_with_path(outputs)
    return {path: t for path, t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.dim() >= 2}
