"""The model run once before it is captured, on two samples of the caller's own inputs.

What its code caches then holds values, not the fakes of torch.export, and what it returns is what the captured graph
is held against.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

SAMPLES = 2
PLAIN: AbstractContextManager[Any] = contextlib.nullcontext()


@dataclass(frozen=True)
class FirstRun:
    """What the model gave back before it was captured.

    Args:
        leaves: the flat inputs that it ran on.
        outputs: flat.
        why: why it was not run, "" where it was.
    """

    leaves: Sequence[Any] = ()
    outputs: Sequence[Any] = ()
    why: str = ""


def first_hindrance(model: nn.Module, leaves: Sequence[Any]) -> str:
    """Why the model must not, or cannot, be run once more than the caller does; "" where it can."""
    if any(module.training for module in model.modules()):
        return "in train mode a run may change the model; compared in eval mode only"
    if any(isinstance(leaf, FakeTensor) or (isinstance(leaf, Tensor) and leaf.is_meta) for leaf in leaves):
        return "the inputs hold no values"
    return ""


def first_run(model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec, runs: Sequence[bool]) -> FirstRun:
    """Runs the model on the first two samples, or on all where two do not run.

    Buffers that every run writes into are put back; those that only the first one filled are kept.

    Args:
        leaves: the flat inputs.
        spec: how they are nested.
        runs: which of them run over samples, `batched`.

    Raises:
        Exception: the model's own, where it does not run on all samples either.
    """
    if why := first_hindrance(model, leaves):
        return FirstRun(why=why)
    before = _buffers(model)
    few = [leaf[:SAMPLES] if over else leaf for leaf, over in zip(leaves, runs, strict=True)]
    try:
        outputs = outputs_of(model, few, spec)
    except Exception:  # frames or crops of one clip in the batch: not every number of them runs
        few = list(leaves)
        outputs = outputs_of(model, few, spec)
    if filled := _written(before):
        again = _buffers(model)
        outputs_of(model, few, spec)
        every_time = {(id(b.table), b.name) for b in _written(again)}
        with torch.no_grad():
            for b in filled:
                now = b.table.get(b.name)
                if (id(b.table), b.name) in every_time and now is not None and now.shape == b.value.shape:
                    b.table[b.name] = b.buffer
                    b.buffer.copy_(b.value)
    return FirstRun(few, outputs)


def outputs_of(
    model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec, mode: AbstractContextManager[Any] = PLAIN
) -> list[Any]:
    """What the model returns, flat, under a mode that watches its functions; it may write into its inputs."""
    # what a cache keeps must serve with gradients as well
    with alike(leaves), torch.inference_mode(False), torch.no_grad():
        own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(own, spec)
        with mode:
            return pytree.tree_leaves(model(*args, **kwargs))


@contextlib.contextmanager
def alike(leaves: Sequence[Any]) -> Iterator[None]:
    """No gradients, the same random numbers each time, and none of the kernels that torch takes in eager mode only."""
    gpus = list({leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda})
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # rounds otherwise, and gives zeros for padding
    try:
        with torch.random.fork_rng(gpus), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass(frozen=True)
class _Buffer:
    """A buffer as it was: the tensor, how often it had been written into, a copy."""

    table: dict[str, Tensor | None]
    name: str
    buffer: Tensor
    version: int
    value: Tensor


def _buffers(model: nn.Module) -> list[_Buffer]:
    return [
        _Buffer(module._buffers, name, buffer, _version(buffer), buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]


def _written(before: Sequence[_Buffer]) -> list[_Buffer]:
    """Those that are other tensors now, or hold other values."""
    return [
        b
        for b in before
        if b.table.get(b.name) is not b.buffer
        or _version(b.buffer) != b.version
        or not torch.equal(b.buffer, b.value)  # .data is written into without a trace
    ]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
