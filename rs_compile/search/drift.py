"""How far outputs are from the dense model's, a number a picture, without labels."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rs_compile.search.pictures import SearchError

Metric = Callable[..., Tensor]


@dataclass(frozen=True)
class Drift:
    """What is measured.

    Args:
        name: "1 - cosine", "KL divergence" or the name of the user's own.
        identity: the name, and of the user's own a hash of its code: another one's records are not taken for it.
        of: (outputs, dense outputs, index [B]) -> [B], lower is better.
        logits: where logits are among the outputs, for the agreement of the best class; None where none are.
    """

    name: str
    of: Metric
    logits: Callable[[Any], Tensor] | None = None
    identity: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", self.identity or self.name)

    def agreement(self, outputs: Any, dense: Any) -> Tensor | None:
        """[B], 1 where both name the same class first."""
        if self.logits is None:
            return None
        return (self.logits(outputs).argmax(-1) == self.logits(dense).argmax(-1)).double()


def choose(metric: Metric | str | None, model: nn.Module, dense: Any) -> Drift:
    """The user's metric, or the one that fits what the model returns.

    Args:
        metric: "cosine", "kl", or a callable (outputs, dense outputs) or (outputs, dense outputs, index) -> [B];
            None chooses by whether the outputs are logits of classes.
        dense: the outputs of one batch.

    Raises:
        SearchError: the metric cannot be, or there is nothing to compare.
    """
    logits = _logits(model, dense)
    if metric is None:
        metric = "cosine" if logits is None else "kl"
    if callable(metric):
        name = getattr(metric, "__name__", type(metric).__name__)
        return Drift(name, _with_index(metric), logits, f"{name} {_code(metric)}")
    if metric == "cosine":
        if not _floats(dense):
            raise SearchError("the model returns no tensor of floats; pass metric=, (outputs, dense outputs) -> [B]")
        return Drift("1 - cosine", lambda outputs, dense, _: cosine(outputs, dense))
    if metric == "kl":
        pick = logits or _one_row
        pick(dense)
        return Drift("KL divergence", lambda outputs, dense, _: divergence(pick(outputs), pick(dense)), pick)
    raise SearchError(f'metric is {metric!r}; write "cosine", "kl", or a callable (outputs, dense outputs) -> [B]')


def cosine(outputs: Any, dense: Any) -> Tensor:
    """1 - cosine over the channels, mean over positions and over the outputs that were asked for: [B]."""
    means, found = [], _floats(outputs)
    for place, wanted in _floats(dense).items():
        if place in found:  # optimize(outputs=...) leaves the others out
            axis = 1 if wanted.dim() == 4 else -1  # maps are [B, C, H, W]
            near = torch.cosine_similarity(found[place].double(), wanted.double(), dim=axis)
            means.append(1 - near.reshape(len(near), -1).mean(1))
    return torch.stack(means).mean(0)


def divergence(outputs: Tensor, dense: Tensor) -> Tensor:
    """KL(dense || outputs) of logits [B, ..., K], in nats, mean over positions: [B]."""
    found, wanted = outputs.double().log_softmax(-1), dense.double().log_softmax(-1)
    apart = (wanted.exp() * (wanted - found)).sum(-1)
    return apart.reshape(len(apart), -1).mean(1)


def _code(metric: Metric) -> str:
    code = getattr(metric, "__code__", None) or getattr(type(metric).__call__, "__code__", None)
    if code is None:
        return ""
    constants = [c for c in code.co_consts if not inspect.iscode(c)]  # the text of code holds its address
    return hashlib.sha256(repr((code.co_code, constants)).encode()).hexdigest()[:16]


def _with_index(metric: Metric) -> Metric:
    """Metrics of two arguments beside those of three, which are told which pictures they see."""
    try:
        inspect.signature(metric).bind(None, None, None)
    except TypeError:
        return lambda outputs, dense, _: metric(outputs, dense)
    except ValueError:  # a builtin without a signature
        return lambda outputs, dense, _: metric(outputs, dense)
    return metric


def _logits(model: nn.Module, dense: Any) -> Callable[[Any], Tensor] | None:
    """Where an output is called logits, or is one row a picture and as long as the model has classes."""
    if isinstance(dense, Mapping) and isinstance(dense.get("logits"), Tensor) and dense["logits"].dim() == 2:
        return lambda outputs: outputs["logits"]
    classes = getattr(model, "num_classes", None) or getattr(getattr(model, "fc", None), "out_features", None)
    if isinstance(dense, Tensor) and dense.dim() == 2 and dense.shape[1] == classes and classes > 1:
        return lambda outputs: outputs
    return None


def _one_row(outputs: Any) -> Tensor:
    tensors = list(_floats(outputs).values())
    if len(tensors) != 1 or tensors[0].dim() != 2:
        raise SearchError(
            'metric="kl" compares one row of logits a picture, [B, K], and the model returns other things'
        )
    return tensors[0]


def _floats(outputs: Any) -> dict[Any, Tensor]:
    """Tensors of floats with a channel dimension, by their place."""
    if isinstance(outputs, Mapping):
        outputs = dict(outputs)
    elif is_dataclass(outputs) and not isinstance(outputs, type):
        outputs = {f.name: getattr(outputs, f.name) for f in fields(outputs)}
    leaves, _ = pytree.tree_flatten_with_path(outputs)
    return {path: t for path, t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.dim() >= 2}
