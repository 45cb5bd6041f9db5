"""What an op gives on fake tensors, remembered: a network repeats few ops on few shapes.

Running an op on fake tensors takes milliseconds, most of it symbolic arithmetic. What comes out depends on the op,
its plain arguments and the metadata of its tensors alone, so each of these is run once for a capture, and where it
can be on a literal number of samples (`passes.graph.literal_batch`). Values that are alike may be one object.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode

from passes.graph.described import Described
from passes.graph.literal_batch import on_literal_batch

Key: TypeAlias = tuple[Any, ...]
Op: TypeAlias = Callable[..., Any]

_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


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
