"""What torch.export leaves on a model while it traces it: found and put back.

The model's code may keep what it computes: in attributes, in dicts and lists, in what functools.lru_cache holds, in
closures, in globals of its source. While it is traced that are fakes, and a fake found later is an error or a
wrong answer. torch.export puts back attributes of modules that were there before, and no more.
"""

from __future__ import annotations

import gc
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import Proxy

# whose code keeps nothing of models; an assert that pytest has rewritten leads to all of a test run
_FOREIGN = (sys.stdlib_module_names | {"torch", "numpy", "sympy", "_pytest"}) - {"__main__"}
_KEEPERS = ("collections", "weakref", "types")  # classes of the standard library that hold what they are given
_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called")))
_LRU_CACHE = type(lru_cache(lambda: None))
_NUMBERS = torch.SymInt | torch.SymFloat | torch.SymBool
_ABSENT = object()


@dataclass(frozen=True)
class Kept:
    """A place in which tracing left a fake.

    Args:
        path: in words, `model.rope.tables[16]`.
        before: what was there, or, of a container, all that it held.
        new: whether a tensor was left where nothing was.
    """

    path: str
    before: tuple[Any, ...]
    new: bool


@dataclass(frozen=True)
class _Place:
    """Something that holds values under names, and the values that it held.

    Args:
        path: how code reaches it.
        holder: a dict, list, deque, set, closure cell, class, or an object with slots.
        names: which of its names count, None for all.
        dotted: whether code writes its names behind a dot.
        before: its values by name.
        own: whether it belongs to the model, which is put back whole; elsewhere only fakes are.
    """

    path: str
    holder: Any
    names: frozenset[str] | None
    dotted: bool
    before: dict[Any, Any]
    own: bool

    def put_back(self) -> Iterator[Kept]:
        now = _held(self.holder, self.names)
        changed = []
        for name in self.before.keys() | now.keys():
            old, new = self.before.get(name, _ABSENT), now.get(name, _ABSENT)
            if old is not new and (self.own or _traced(new)):
                changed.append(name)
                if _traced(new):
                    before = (old,) if self.dotted else tuple(self.before.values())
                    # a number of samples in an attribute is written anew by every call
                    is_new = (old is _ABSENT or old is None) and not isinstance(new, _NUMBERS)
                    yield Kept(_path(self.path, name, self.dotted), before, is_new)
        if changed:
            _write(self.holder, self.before, changed)


class Untouched:
    """Everything that a model's code may keep values in, as it is now."""

    def __init__(self, model: nn.Module) -> None:
        walk = _Walk()
        walk.run(model)
        self._places, self._caches = walk.places, walk.caches

    def put_back(self) -> list[Kept]:
        """Puts back what has changed since; says where fakes were."""
        kept = [found for place in self._places for found in place.put_back()]
        for path, cache in self._caches:
            if any(_traced(value) for value in gc.get_referents(cache)):
                cache.cache_clear()
                kept.append(Kept(f"the lru_cache of {path}", (), True))
        return kept


class _Walk:
    """Goes from a model to what it holds, and from its code to what that names."""

    def __init__(self) -> None:
        self.places: list[_Place] = []
        self.caches: list[tuple[str, Any]] = []
        self._seen: dict[int, Any] = {}  # the values too: an id is for as long as its object lives
        self._waiting: list[Callable[[], None]] = []
        self._classes: dict[type, Mapping[str, Any]] = {}
        self._names = {"forward", "__call__"}  # that code reached so far reads

    def run(self, model: nn.Module) -> None:
        self._value(type(model).__name__, model, True)
        while self._waiting:
            while self._waiting:
                self._waiting.pop()()
            for kind, held in self._classes.items():  # not every method that there is: from_pretrained leads anywhere
                for name in self._names & held.keys():
                    self._value(f"{kind.__qualname__}.{name}", held[name], False)

    def _value(self, path: str, value: Any, own: bool) -> None:
        if value is None or issubclass(_class_of(value), str | int | float | Tensor) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        self._waiting.append(partial(self._inside, path, value, own))

    def _inside(self, path: str, value: Any, own: bool) -> None:
        kind = _class_of(value)
        if issubclass(kind, nn.Module):
            self._module(path, value, own)
        elif issubclass(kind, dict | list | deque | set):
            self._place(path, value, own)
        elif issubclass(kind, tuple | frozenset):
            for i, part in enumerate(value):
                self._value(f"{path}[{i}]", part, own)
        elif issubclass(kind, _LRU_CACHE):
            self.caches.append((value.__qualname__, value))
            self._value(path, value.__wrapped__, False)
        elif issubclass(kind, types.FunctionType):
            self._function(value)
        elif issubclass(kind, types.MethodType):
            self._value(path, value.__self__, own)
            self._value(path, value.__func__, False)
        elif issubclass(kind, partial):
            self._inside(path, (value.func, value.args, value.keywords), own)
        elif issubclass(kind, staticmethod | classmethod):
            self._value(path, value.__func__, False)
        elif issubclass(kind, property):
            self._inside(path, (value.fget, value.fset), False)
        elif issubclass(kind, type):
            self._class(value)
        elif not issubclass(kind, types.ModuleType):
            self._object(path, value, own)

    def _module(self, path: str, module: nn.Module, own: bool) -> None:
        self._place(path, vars(module), own, dotted=True)
        self._class(type(module))

    def _object(self, path: str, value: Any, own: bool) -> None:
        kind = type(value)
        if _foreign(kind.__module__) and kind.__module__.partition(".")[0] not in _KEEPERS:
            return
        if isinstance(held := _attribute(value, "__dict__"), dict):
            self._place(path, held, own, dotted=True)
        if slots := {name for base in kind.__mro__ for name in _slots(base)}:
            self._place(path, value, own, frozenset(slots), dotted=True)
        self._class(kind)

    def _class(self, kind: type) -> None:
        for base in kind.__mro__:
            if not _foreign(base.__module__) and base not in self._classes:
                held = self._classes[base] = _held(base, None)
                self.places.append(_Place(base.__qualname__, base, None, True, held, False))

    def _function(self, function: types.FunctionType) -> None:
        if _foreign(function.__module__):
            return
        path = function.__qualname__
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._place(f"{name} of {path}", cell, False)
        self._inside(path, function.__defaults__ or (), False)
        self._inside(path, tuple((function.__kwdefaults__ or {}).values()), False)
        names = frozenset(_names(function.__code__))
        self._names |= names
        tables = [function.__globals__]
        tables += [vars(m) for name in names if issubclass(type(m := function.__globals__.get(name)), types.ModuleType)]
        for table in tables:
            if not _foreign(table.get("__name__")):
                self._place(str(table.get("__name__")), table, False, names, dotted=True)

    def _place(
        self, path: str, holder: Any, own: bool, names: frozenset[str] | None = None, *, dotted: bool = False
    ) -> None:
        """Notes a holder and goes on with what it holds."""
        held = _held(holder, names)
        self.places.append(_Place(path, holder, names, dotted, held, own))
        for name, value in held.items():
            if dotted and name in _HOOKS and value is not None:  # which hooks there are, not what they hold
                self.places.append(_Place(_path(path, name, dotted), value, None, False, _held(value, None), own))
            else:
                self._value(_path(path, name, dotted), value, own)


def _class_of(value: Any) -> type:
    """Of a weak reference's proxy the class of what it stands for; once that is gone, or cannot be asked, its own."""
    try:
        found: type = value.__class__
        return found
    except Exception:
        return type(value)


def _attribute(value: Any, name: str) -> Any:
    """An attribute, if it can be read: what raises when it is looked at keeps nothing that can be found."""
    try:
        return getattr(value, name)
    except Exception:
        return _ABSENT


def _path(holder: str, name: Any, dotted: bool) -> str:
    table = holder.removesuffix("._modules").removesuffix("._buffers")  # code reaches these without the table
    if name == "":
        return holder
    return f"{table}.{name}" if dotted or table != holder else f"{holder}[{name!r}]"


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _names(code: types.CodeType) -> Iterator[str]:
    """The names that a function's code reads, in functions within it as well."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _foreign(module: str | None) -> bool:
    return (module or "builtins").partition(".")[0] in _FOREIGN


def _held(holder: Any, names: frozenset[str] | None) -> dict[Any, Any]:
    """The values of a holder by name."""
    kind = type(holder)  # what isinstance asks of a lazy object may raise
    if issubclass(kind, types.CellType):
        try:
            return {"": holder.cell_contents}
        except ValueError:  # empty
            return {}
    if issubclass(kind, set):
        return {id(value): value for value in list(holder)}
    if issubclass(kind, list | deque):
        return dict(enumerate(holder))
    table = vars(holder) if issubclass(kind, type) else holder
    if names is None:
        return dict(list(table.items()))
    if issubclass(type(table), dict | types.MappingProxyType):
        return {name: table[name] for name in names if name in table}
    return {name: value for name in names if (value := _attribute(table, name)) is not _ABSENT}


def _write(holder: Any, before: Mapping[Any, Any], changed: Iterable[Any]) -> None:
    """Gives a holder back what it held under these names."""
    if issubclass(type(holder), list | deque | set):
        holder.clear()
        (holder.update if isinstance(holder, set) else holder.extend)(before.values())
        return
    for name in changed:
        there, value = name in before, before.get(name)
        if issubclass(type(holder), types.CellType):
            holder.cell_contents = value
        elif issubclass(type(holder), dict):
            holder.update({name: value}) if there else holder.pop(name)
        else:
            setattr(holder, name, value) if there else delattr(holder, name)


def _traced(value: Any, depth: int = 3) -> bool:
    """Whether a value is, or holds, what only tracing makes."""
    kind = type(value)
    if issubclass(kind, FakeTensor | Proxy | _NUMBERS):
        return True
    if issubclass(kind, Tensor):
        return torch._is_functional_tensor(value)
    if not depth:
        return False
    if issubclass(kind, Mapping):
        return any(_traced(v, depth - 1) for v in list(value.values()))
    return issubclass(kind, list | tuple | set | frozenset | deque) and any(_traced(v, depth - 1) for v in list(value))
