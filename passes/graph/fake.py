"""What an op gives on fake tensors, remembered: a network repeats few ops on few shapes.

Running an op on fake tensors takes milliseconds, most of it symbolic arithmetic. What comes out depends on the op,
its plain arguments and the metadata of its tensors alone, so each of these is run once for a capture. Values that
are alike may be one object.

Where it can be, the op runs with a large prime in the place of the batch symbol: symbolic sizes make fake tensors
several times as slow. A size or stride of a result that the prime divides counts samples, any other that is smaller
does not. Where that says nothing (two symbols, a size as large, an op that does not run on so many samples) the
symbol itself is used.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import SymInt
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from passes.graph.layout import sequences

Key: TypeAlias = tuple[Any, ...]
Op: TypeAlias = Callable[..., Any]

_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_SAMPLES = 1_000_000_007  # a prime that nobody writes into a model


@dataclass(frozen=True)
class Described:
    """A tensor without the tensor. Offsets in memory are left out: no shape depends on them."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, value: FakeTensor) -> Described:
        return cls(tuple(value.shape), tuple(value.stride()), value.dtype, value.device, value.requires_grad)

    def fresh(self, mode: FakeTensorMode) -> FakeTensor:
        """A fake tensor like this, of its own memory."""
        with torch.no_grad():
            meta = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
            return FakeTensor(mode, meta.requires_grad_(self.requires_grad), self.device)


@dataclass
class _Result:
    """What an op gave on tensors like these; its value is made when it is first asked for."""

    described: Described
    value: Callable[[], FakeTensor | None] = lambda: None  # weakly: torch's own caches keep the mode alive


def evaluate(mode: FakeTensorMode, target: Op, args: Any, kwargs: Any) -> Any:
    """Runs an op on fake values, or gives what it gave on the like before.

    Args:
        mode: that the values belong to; the batch stays the symbol that it is there.
        target, args, kwargs: the call, fake values in place of nodes.

    Raises:
        Exception: whatever the op raises.
    """

    def value(one: Any) -> Any:
        if not isinstance(one, _Result):
            return one
        found = one.value()
        if found is None:
            found = one.described.fresh(mode)
            one.value = weakref.ref(found)
        return found

    result = _recalled(mode, target, args, kwargs)
    return [value(one) for one in result] if isinstance(result, list) else value(result)


def describe(mode: FakeTensorMode, target: Op, args: Any, kwargs: Any) -> Any:
    """The same for who wants `shape`, `dtype` and `device` only, and no tensor."""
    found = _recalled(mode, target, args, kwargs)
    return found.described if isinstance(found, _Result) else found


def remember(mode: FakeTensorMode, target: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Notes what an op gave when it was traced on fake values of this mode."""
    _keep(memory_of(mode), call_key(target, args, kwargs), out)


def call_key(target: Op, args: Any, kwargs: Any) -> Key | None:
    """All that the result of an op depends on, or None where that is more than metadata, or not known."""
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return None
    if target._schema.is_mutable or _DATA_DEPENDENT & set(target.tags):
        return None
    parts: list[Any] = [target]
    return tuple(parts) if _write((args, kwargs), parts) else None


def memory_of(mode: FakeTensorMode) -> dict[Key, Any]:
    """What is remembered of a capture; it lives as long as the capture's values."""
    memory: dict[Key, Any] = mode.__dict__.setdefault("rs_compile_memory", {})
    return memory


def _recalled(mode: FakeTensorMode, target: Op, args: Any, kwargs: Any) -> Any:
    key, memory = call_key(target, args, kwargs), memory_of(mode)
    if key is not None and key in memory:
        return memory[key]
    found = on_literal_batch(mode, target, args, kwargs) if key is not None else None
    if key is not None and found is not None:
        memory[key] = [_Result(one) for one in found] if isinstance(found, list) else _Result(found)
        return memory[key]
    with mode, enable_python_dispatcher(), torch.enable_grad():  # keeps the batch symbolic
        out = target(*args, **kwargs)
    _keep(memory, key, out)
    # not what came out: it holds on to all that its gradient would need
    return memory.get(key, out) if key is not None else out


def _keep(memory: dict[Key, Any], key: Key | None, out: Any) -> None:
    values = out if isinstance(out, (list, tuple)) else [out]
    if key is not None and all(_plain_tensor(v) for v in values):
        found = [_Result(Described.of(v)) for v in values]
        memory[key] = found if isinstance(out, (list, tuple)) else found[0]


def _plain_tensor(value: Any) -> bool:
    return (
        isinstance(value, FakeTensor) and value.layout is torch.strided and not value.is_conj() and not value.is_neg()
    )


def _write(value: Any, parts: list[Any]) -> bool:
    """Appends what a result can depend on of a value, flat; False where that is not known."""
    if isinstance(value, torch.Tensor):
        if not _plain_tensor(value):
            return False
        parts += ["tensor", value.dtype, value.device, value.requires_grad, value.dim()]
        parts += [_size(size) for size in (*value.shape, *value.stride())]
        return True
    if isinstance(value, torch.SymInt):
        parts += ["size", value.node.expr]
        return True
    if isinstance(value, (list, tuple)):
        parts += [type(value), len(value)]
        return all(_write(item, parts) for item in value)
    if isinstance(value, dict):
        parts += ["by name", *value]
        return all(_write(item, parts) for item in value.values())
    parts += [type(value), value]  # 1, 1.0 and True are equal
    return isinstance(value, _PLAIN)


def _size(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


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
