"""How far outputs are from the dense model's, a number a picture, without labels."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rs_compile.drift import cosine, divergence, floats, logits_of
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
    logits = logits_of(model, dense)
    if metric is None:
        metric = "cosine" if logits is None else "kl"
    if callable(metric):
        name = getattr(metric, "__name__", type(metric).__name__)
        return Drift(name, _with_index(metric), logits, f"{name} {_code(metric)}")
    if metric == "cosine":
        if not floats(dense):
            raise SearchError("the model returns no tensor of floats; pass metric=, (outputs, dense outputs) -> [B]")
        return Drift("1 - cosine", lambda outputs, dense, _: cosine(outputs, dense))
    if metric == "kl":
        pick = logits or _one_row
        pick(dense)
        return Drift("KL divergence", lambda outputs, dense, _: divergence(pick(outputs), pick(dense)), pick)
    raise SearchError(f'metric is {metric!r}; write "cosine", "kl", or a callable (outputs, dense outputs) -> [B]')


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


def _one_row(outputs: Any) -> Tensor:
    tensors = list(floats(outputs).values())
    if len(tensors) != 1 or tensors[0].dim() != 2:
        raise SearchError(
            'metric="kl" compares one row of logits a picture, [B, K], and the model returns other things'
        )
    return tensors[0]
