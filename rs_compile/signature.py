"""What a compiled plan is right for: the inputs' shapes, and the state of model and autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from passes.base import CompileError
from passes.capture import batched

_AUTOCAST = ("cpu", "cuda")  # device types that have it


class InputError(CompileError, TypeError):
    """The model was called with something that cannot be captured; says what was expected."""


def check_inputs(model: nn.Module, leaves: Sequence[Any]) -> None:
    """Refuses inputs that hold no tensor.

    Raises:
        InputError: they do not.
    """
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        given = ", ".join(type(leaf).__name__ for leaf in leaves) or "nothing"
        raise InputError(f"{type(model).__name__} was called with {given}; pass tensors, [batch, ...]")


def autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    """The device types under autocast, with its dtype."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in _AUTOCAST if torch.is_autocast_enabled(d))


def state_key(model: nn.Module) -> tuple[Any, ...]:
    """What a captured graph depends on besides the inputs."""
    parts: list[Any] = []
    for module in model.modules():
        parts.append(module.training)
        for table in (module._parameters, module._buffers):
            parts += [(id(t), t.dtype, t.device) for t in table.values() if t is not None]
    return (tuple(parts), autocast_state())


def input_key(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """The input signature: everything but the number of samples."""
    runs = batched(leaves)
    return tuple(
        (leaf.shape[1:] if over else leaf.shape, leaf.stride()[1:], over, leaf.dtype, leaf.device)
        if isinstance(leaf, torch.Tensor)
        else repr(leaf)
        for leaf, over in zip(leaves, runs, strict=True)
    )


def batch_sizes(leaves: Sequence[Any]) -> tuple[int, ...]:
    """The first size of each tensor."""
    return tuple(leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim())


def signature(leaves: Sequence[Any]) -> str:
    """The input signature as text: `float32[B, 3, 224, 224] on cpu`."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    runs = batched(tensors)
    texts = []
    for t, over in zip(tensors, runs, strict=True):
        sizes = ", ".join("B" if over and d == 0 else str(s) for d, s in enumerate(t.shape))
        texts.append(f"{str(t.dtype).removeprefix('torch.')}[{sizes}] on {t.device}")
    return ", ".join(texts)
