"""The residual sums of a layer, followed op by op in an eager run: what was added, and to what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

aten = torch.ops.aten
_SUMS, _SCALES = (aten.add.Tensor, aten.add_.Tensor), (aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor)
_Value = tuple[int, int]  # its memory, and how often that was written into: a view is the same value


class NoSum(Exception):
    """A value is not the plain sum of a residual stream and what was computed from it."""


class Sum(NamedTuple):
    """x + f(x): the stream x and the branch's output f(x), of one shape."""

    stream: Tensor
    term: Tensor


class Sums:
    """What is added to a layer's residual stream."""

    def __init__(self) -> None:
        self._sums: dict[_Value, Sum] = {}
        self._from: dict[_Value, frozenset[_Value]] = {}  # what it was computed from, and itself
        self._joined: set[_Value] = set()  # two branches added, and that scaled: of neither alone
        self._alive: list[Tensor] = []  # so that memory is not given out again
        self._writes: Counter[int] = Counter()  # a tensor's own counter moves only when the dispatcher is done

    def begin(self, stream: Tensor) -> None:
        """Starts at a layer's input; what was before is forgotten."""
        self._sums, self._joined, self._alive, self._writes = {}, set(), [stream], Counter()
        self._from = {self._value(stream): frozenset([self._value(stream)])}

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs an op, and notes what came of it."""
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        sources = frozenset[_Value]().union(*(self._from.get(self._value(x), frozenset()) for x in given))
        found, joined = self._sum(func, given, kwargs), self._joins(func, given)
        out = func(*args, **kwargs)
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._alive.append(tensor)
                self._writes[_memory(tensor)] += func._schema.is_mutable  # what was written into is returned
                self._from.setdefault(self._value(tensor), sources | {self._value(tensor)})
        if found is not None:
            self._sums[self._value(out)] = found
        elif joined:
            self._joined.add(self._value(out))
        return out

    def of(self, value: Tensor) -> Sum:
        """The sum that a value is.

        Raises:
            NoSum: it is none.
        """
        found = self._sums.get(self._value(value))
        if found is None or found.stream.shape != value.shape:
            raise NoSum
        return found

    def _value(self, tensor: Tensor) -> _Value:
        return _memory(tensor), self._writes[_memory(tensor)]

    def _sum(self, func: Any, given: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Sum | None:
        if func not in _SUMS or len(given) != 2 or kwargs:
            return None
        a, b = given
        for stream, term in ((a, b), (b, a)):
            x, f = self._value(stream), self._value(term)
            if x != f and x in self._from.get(f, ()) and stream.shape == term.shape and f not in self._joined:
                return Sum(stream.clone(), term.clone())  # the model may go on writing into either
        return None

    def _joins(self, func: Any, given: Sequence[Tensor]) -> bool:
        values = [self._value(x) for x in given]
        if func in _SUMS:
            return len(values) == 2 and all(v in self._from for v in values)
        return func in _SCALES and any(v in self._joined for v in values)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
