"""A large prime in the place of the batch symbol: symbolic sizes make fake tensors several times as slow.

A size or stride of a result that the prime divides counts samples, any other that is smaller does not. Where that
says nothing (two symbols, a size as large, an op that does not run on so many samples) the symbol itself is used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import SymInt
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from passes.graph.described import Described
from passes.graph.layout import sequences

_SAMPLES = 1_000_000_007  # a prime that nobody writes into a model


@dataclass(frozen=True)
class LiteralBatch:
    """Translates between values with the batch symbol and values with the prime.

    Args:
        mode: that the fake tensors belong to.
        batch: the symbol.
    """

    mode: FakeTensorMode
    batch: SymInt

    @classmethod
    def of(cls, mode: FakeTensorMode, leaves: Sequence[Any]) -> LiteralBatch | None:
        """For the one symbol in these values, where one of their sizes is so many times it."""
        shapes = [s for leaf in leaves for s in _sizes(leaf)]
        strides = [s for leaf in leaves if isinstance(leaf, torch.Tensor) for s in leaf.stride()]
        found = [s.node.expr.free_symbols for s in (*shapes, *strides) if isinstance(s, SymInt)]
        symbols: set[Any] = reduce(operator.or_, found, set())
        rows = {count: s for s in shapes if isinstance(s, SymInt) and (count := sequences(s))}
        if len(symbols) != 1 or not rows:
            return None
        count = min(rows)
        return cls(mode, rows[count] if count == 1 else rows[count] // count)

    def literal(self, value: Any) -> Any:
        """A value with the prime for the symbol.

        Raises:
            ValueError: a size is no multiple of the symbol.
        """
        if isinstance(value, SymInt):
            return self._number(value)
        if not isinstance(value, FakeTensor):
            return value
        shape, stride = (tuple(self._number(s) for s in sizes) for sizes in (value.shape, value.stride()))
        return Described(shape, stride, value.dtype, value.device, value.requires_grad).fresh(self.mode)

    def described(self, value: Any) -> Described:
        """A tensor that was made from literal ones, with the symbol.

        Raises:
            ValueError: that cannot be told.
        """
        if not isinstance(value, FakeTensor) or value.layout is not torch.strided or value.is_conj() or value.is_neg():
            raise ValueError("no plain tensor")
        shape, stride = (tuple(self._size(s) for s in sizes) for sizes in (value.shape, value.stride()))
        return Described(shape, stride, value.dtype, value.device, value.requires_grad)

    def symbolic(self, value: Any) -> Any:
        """The same for tensors, numbers, and lists of them: fake tensors and sizes with the symbol."""
        if isinstance(value, (list, tuple)):
            made = [self.symbolic(one) for one in value]
            return made if isinstance(value, list) else tuple(made)
        return self.described(value).fresh(self.mode) if isinstance(value, torch.Tensor) else self._size(value)

    def times(self, size: Any) -> int:
        """How many times the symbol a size is, 0 where it does not count samples."""
        return (sequences(size) or 0) if isinstance(size, SymInt) else 0

    def multiple(self, number: Any) -> int:
        """How many times the batch a number is, 0 where it does not count samples."""
        whole = isinstance(number, int) and not isinstance(number, bool) and number % _SAMPLES == 0
        return number // _SAMPLES if whole else 0

    def _number(self, size: int | SymInt) -> int:
        if not isinstance(size, SymInt):
            return size
        factor = size.node.expr / self.batch.node.expr
        if not factor.is_Integer:
            raise ValueError(f"{size} is no multiple of {self.batch}")
        return int(factor) * _SAMPLES

    def _size(self, number: int | SymInt) -> int | SymInt:
        if not isinstance(number, int) or (number > _SAMPLES and number % _SAMPLES):
            raise ValueError(f"{number} does not tell how often it counts samples")
        count = self.multiple(number)
        return number if count == 0 else self.batch if count == 1 else self.batch * count


def on_literal_batch(mode: FakeTensorMode, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What an op gives, described (a list for several tensors), or None where that cannot be told.

    Args:
        mode: that the fake tensors in the arguments belong to.
        target, args, kwargs: the call.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    literal = LiteralBatch.of(mode, leaves)
    if literal is None:
        return None
    try:
        given_args, given_kwargs = pytree.tree_unflatten([literal.literal(leaf) for leaf in leaves], spec)
        with mode, torch.enable_grad():
            out = target(*given_args, **given_kwargs)
        return [literal.described(one) for one in out] if isinstance(out, (list, tuple)) else literal.described(out)
    except Exception:
        return None  # what is wrong with it, running on the symbol says


def _sizes(leaf: Any) -> tuple[Any, ...]:
    return tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else (leaf,)
