"""What a captured graph depends on besides the inputs: the model's tensors, attributes, hooks and code.

It is asked for at every call, so a dictionary is read again only where it has another version, which CPython (from 3.12
on torch, who watches it) gives it when it is written to. Lists and types are compared by identity.
"""

from __future__ import annotations

import gc
import operator
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_AUTOCAST = ("cpu", "cuda")  # device types that have it
_ATOMS = frozenset({bool, int, str, bytes, type(None), torch.dtype, torch.device})
_TENSORS = ("_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TABLES = frozenset(vars(nn.Module())) - {"training"}  # read by themselves, or of no effect on a forward pass
_IGNORED = _TABLES - {*_TENSORS, "_modules", *_HOOKS}
_PATCHED = ("__call__", "__getattr__")  # of nn.Module, by torch.fx
_DEPTH = 3  # of containers in attributes
_RECENT = 8  # states that a model may go back to without being compared in full at every call
_KIND = operator.attrgetter("dtype", "device", "requires_grad", "shape")
_CODE = operator.attrgetter("__code__")
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
# torch's own affair: without them everything is compared entry by entry
_GUARDS: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_dict_version: Any = getattr(_GUARDS, "dict_version", None)
_tensor_guards: Any = getattr(_GUARDS, "TensorGuards", None)


def autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    """The device types under autocast, with its dtype."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in _AUTOCAST if torch.is_autocast_enabled(d))


class State:
    """What a captured graph depends on besides the inputs; compared, and the key of a plan.

    Args:
        identities: which parameters and buffers there are.
        rest: their dtypes, devices, shapes and requires_grad; the modules, their attributes, hooks and classes.
        autocast: the device types that it is on for, with its dtypes.
    """

    __slots__ = ("_hash", "autocast", "identities", "rest")

    def __init__(self, identities: tuple[int, ...], rest: tuple[Any, ...], autocast: tuple[Any, ...]) -> None:
        self.identities, self.rest, self.autocast = identities, rest, autocast
        self._hash = hash((identities, rest, autocast))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, State)
            and self._hash == other._hash
            and (self.identities, self.rest, self.autocast) == (other.identities, other.rest, other.autocast)
        )

    def traced_as(self, other: State) -> bool:
        """Whether other differs only by what torch.fx puts in place while it traces: tensors, and two methods."""

        def own(state: State) -> list[Any]:
            return [e for e in state.rest if not (isinstance(e, tuple) and e[:1] and e[0] in _PATCHED)]

        return own(self) == own(other)


class StateReader:
    """Reads the state of a model at every call; in full only where something has changed since the last time.

    Seen are: another module, parameter, buffer, hook or attribute, whichever way it was set; dtypes, devices, shapes
    and requires_grad of parameters and buffers, `param.data = ...` too; train or eval of each module; what lists, sets,
    dictionaries and plain objects in attributes hold, three deep; a module's class, what that and its bases define,
    their methods' code; autocast. Not seen is a change of what lies behind these: a function that a method calls
    (`some_module.attention = ...`), a global variable, an object with slots, the values of a tensor in an attribute
    that is no parameter or buffer, a container that a class holds, changed in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._last: tuple[_Snapshot, State] | None = None
        self._recent: deque[State] = deque(maxlen=_RECENT)

    def __call__(self) -> State:
        autocast = autocast_state()
        if self._last is not None:
            snapshot, state = self._last
            if snapshot.holds(autocast):
                if state.autocast == autocast:
                    return state
                return self._keep(snapshot, State(state.identities, state.rest, autocast))
        snapshot = _Snapshot(self._model)
        return self._keep(snapshot, State(snapshot.identities, snapshot.rest, autocast))

    def _keep(self, snapshot: _Snapshot, state: State) -> State:
        """The same object for an equal state, so that keys of plans compare at once."""
        state = next((known for known in list(self._recent) if known == state), state)
        if state not in self._recent:
            self._recent.append(state)
        self._last = snapshot, state
        return state


class _Same:
    """An object as something to compare: which it is. It is not kept alive, and another in its place is not it."""

    __slots__ = ("_get", "_hash")

    def __init__(self, value: Any) -> None:
        self._hash = id(value)
        try:
            self._get: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self._get = lambda: value

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, _Same) and self._get() is other._get() is not None


class _Snapshot:
    """A model as it was: what to compare with another, and how to see at little cost that it is still like this."""

    def __init__(self, model: nn.Module) -> None:
        self._dicts: list[dict[Any, Any]] = []
        self._versions: list[int] = []
        self._places: tuple[list[Any], list[Any], list[Any]] = ([], [], [])  # a dict, a key, the value there
        self._empty: list[dict[Any, Any]] = []
        self._held: list[tuple[Any, list[Any]]] = []  # a list, set or mapping, what it held
        self._tensors: list[Tensor] = []
        self._functions: list[FunctionType] = []
        self._known: dict[tuple[int, int], Any] = {}  # every layer may hold the same config
        self._modules = list(_modules(model))
        self._types = list(map(type, self._modules))
        number = {id(module): i for i, module in enumerate(self._modules)}
        rest: list[Any] = []
        for module, kind in zip(self._modules, self._types, strict=True):
            own = vars(module)
            rest.append(kind)
            for name, value in self._entries(own, _IGNORED):
                if name not in _TABLES:
                    rest.append((name, self._read(value, _DEPTH)))
            for table in _TENSORS:
                for name, tensor in self._entries(own[table]):
                    rest.append((table, name, tensor is None))
                    if tensor is not None:
                        self._tensors.append(tensor)
            rest += [(name, number.get(id(inner))) for name, inner in self._entries(own["_modules"])]
            for table in _HOOKS:
                with_kwargs = own.get(f"{table}_with_kwargs", ())
                rest += [(table, _Same(hook), i in with_kwargs) for i, hook in self._entries(own[table])]
        for base in dict.fromkeys(base for kind in dict.fromkeys(self._types) for base in kind.__mro__[:-1]):
            rest += [base, *self._defined(base)]
        self._codes = list(map(_CODE, self._functions))
        self._kinds = list(map(_KIND, self._tensors))
        self._plain = all(type(t) in _PLAIN and t.layout is torch.strided for t in self._tensors)
        self._guards: dict[Any, Any] = {}  # by what else torch's guards look at
        self.identities = tuple(map(id, self._tensors))
        self.rest = (*rest, *self._codes, *self._kinds)
        self._lengths = list(map(len, self._dicts))
        self._known.clear()

    def holds(self, autocast: tuple[Any, ...]) -> bool:
        """Whether the model is still like this.

        Args:
            autocast: `autocast_state()`.
        """
        return (
            list(map(type, self._modules)) == self._types
            and not any(self._empty)
            and (list(map(_dict_version, self._dicts)) == self._versions if _dict_version else self._entries_hold())
            and all(_holds(value, held) for value, held in self._held)
            and list(map(_CODE, self._functions)) == self._codes
            and (
                list(map(_KIND, self._tensors)) == self._kinds
                if _tensor_guards is None
                else self._tensors_hold(autocast)
            )
        )

    def _entries_hold(self) -> bool:
        dicts, names, values = self._places
        same = all(map(operator.is_, map(dict.get, dicts, names), values))
        return same and list(map(len, self._dicts)) == self._lengths

    def _tensors_hold(self, autocast: tuple[Any, ...]) -> bool:
        """Torch's guards compare all tensors at once, strides too, and differ under autocast and in inference mode."""
        around = (autocast, torch.is_inference_mode_enabled())
        guards = self._guards.get(around)
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(True)  # without gradients they take requires_grad for False
        try:
            if guards is not None and guards.check(*self._tensors):
                return True
            if list(map(_KIND, self._tensors)) != self._kinds:
                return False
            if self._plain and _tensor_guards is not None:
                sizes, strides = [list(t.shape) for t in self._tensors], [list(t.stride()) for t in self._tensors]
                self._guards[around] = _tensor_guards(
                    *self._tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
                )
            return True
        finally:
            torch._C._set_grad_enabled(grad)

    def _entries(self, table: dict[Any, Any], ignored: Collection[str] = ()) -> list[tuple[Any, Any]]:
        """What a dictionary holds, which is looked at from now on."""
        if not table:
            self._empty.append(table)
            return []
        self._dicts.append(table)
        if _dict_version is not None:
            self._versions.append(_dict_version(table))  # before another thread writes into it
        entries = [entry for entry in list(table.items()) if entry[0] not in ignored]
        dicts, names, values = self._places
        dicts += [table] * len(entries)
        names += [name for name, _ in entries]
        values += [value for _, value in entries]
        return entries

    def _read(self, value: Any, depth: int) -> Any:
        """An attribute as something to compare: what containers and plain objects (a config) hold, else which it is."""
        kind = type(value)
        if kind in _ATOMS:
            return kind, value  # True is not 1
        if kind in (float, complex):
            return kind, repr(value)  # nan is itself, 0.0 is not -0.0
        if not depth or issubclass(kind, Tensor | type | ModuleType | FunctionType):
            return _Same(value)
        at = id(value), depth
        if at not in self._known:
            self._known[at] = self._inside(value, depth - 1)
        return self._known[at]

    def _inside(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in (tuple, frozenset):
            return kind, *[self._read(v, depth) for v in value]
        if kind in (list, set):
            held = list(value)
            self._held.append((value, held))
            return kind, *[self._read(v, depth) for v in held]
        if issubclass(kind, dict):
            return kind, *[(k, self._read(v, depth)) for k, v in self._entries(value)]
        if issubclass(kind, MappingProxyType):  # of other mappings the object alone: reading may load something
            pairs = list(value.items())
            self._held.append((value, [x for pair in pairs for x in pair]))
            return kind, *[(k, self._read(v, depth)) for k, v in pairs]
        try:
            own = getattr(value, "__dict__", None)
        except Exception:  # a weak reference's proxy whose object is gone
            return _Same(value)
        if not isinstance(own, dict):
            return _Same(value)
        return _Same(value), kind, *[(k, self._read(v, depth)) for k, v in self._entries(own)]

    def _defined(self, kind: type) -> Iterator[Any]:
        """What a class defines. Its docstring, annotations and the like decide nothing."""
        (defined,) = gc.get_referents(vars(kind))  # the dictionary itself, which has a version
        for name, value in self._entries(defined):
            if callable(value) or isinstance(value, classmethod) or not name.startswith("__"):
                code = value.__func__ if issubclass(type(value), classmethod | staticmethod) else value
                if isinstance(code, FunctionType) and kind is not nn.Module:
                    self._functions.append(code)
                yield name, self._read(value, 0)


def _holds(value: Any, held: Sequence[Any]) -> bool:
    """Whether a list, a set or a mapping holds the same objects still, in the same order."""
    now = [x for pair in list(value.items()) for x in pair] if isinstance(value, MappingProxyType) else list(value)
    return len(now) == len(held) and all(map(operator.is_, now, held))


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """model.modules(), without the names that it builds on the way."""
    waiting: list[nn.Module] = [model]
    seen = set()
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            waiting += [m for m in list(module._modules.values()) if m is not None]
