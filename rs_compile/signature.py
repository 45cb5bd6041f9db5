"""What a compiled plan depends on: the inputs, and everything about the model that a captured graph holds fast."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from passes.capture.capture import batched
from passes.capture.constant_inputs import LARGEST, input_names, is_small
from passes.graph.base import CompileError
from passes.sites.select import FEW

_AUTOCAST = ("cpu", "cuda")  # device types that have it
_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})
_TABLES = frozenset(vars(nn.Module())) - {"training"}  # read below, or of no effect on a forward pass
_READ = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_DEPTH = 3  # of containers in attributes


class InputError(CompileError, TypeError):
    """The model was called with something that cannot be captured; says what was expected."""


def check_inputs(model: nn.Module, leaves: Sequence[Any]) -> None:
    """Refuses inputs that hold no tensor.

    Raises:
        InputError: they do not.
    """
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        given = ", ".join(type(leaf).__name__ for leaf in leaves) or "nothing"
        name = type(model).__name__
        raise InputError(f"{name} was called with {given}; pass tensors, [batch, ...], or a dict of them")


def constant_leaves(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], names: Collection[str]
) -> tuple[int, ...]:
    """The flat input leaves under these names that are tensors; Python values are constants anyway.

    Args:
        names: of arguments, or keys of mappings among the inputs.

    Raises:
        InputError: there is none under a name, or it is not a small tensor of whole numbers with values.
    """
    if not names:
        return ()
    leaves = flatten(args, kwargs)[0]
    paths = input_names(model, args, kwargs)
    known = {name for path in paths for name in path}
    if missing := sorted(set(names) - known):
        raise InputError(
            f"constant_inputs names {', '.join(missing)}, and {type(model).__name__} was called with "
            f"{', '.join(sorted(known)) or 'inputs without names; pass them by keyword'}"
        )
    found = []
    for i, (leaf, path) in enumerate(zip(leaves, paths, strict=True)):
        if not isinstance(leaf, torch.Tensor) or not set(path) & set(names):
            continue
        if not is_small(leaf) or leaf.is_meta or isinstance(leaf, FakeTensor):
            kind = f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)} on {leaf.device}"
            raise InputError(
                f"constant_inputs names {path[-1]}, which is {kind}; its values are compared at every call, so it must "
                f"hold whole numbers or booleans, at most {LARGEST}"
            )
        found.append(i)
    return tuple(found)


def autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    """The device types under autocast, with its dtype."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in _AUTOCAST if torch.is_autocast_enabled(d))


def flatten(args: Any, kwargs: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a call's inputs and how they are nested; a mapping is a container, of whatever class.

    A mapping class that torch does not know yet (transformers' BatchFeature) is registered with torch's pytree,
    as torch.export asks for, where its constructor takes a dict.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    unknown = {type(leaf): leaf for leaf in leaves if isinstance(leaf, Mapping)}
    if unknown and any(_register(kind, example) for kind, example in unknown.items()):
        return flatten(args, kwargs)
    return leaves, spec


def _register(kind: Any, example: Mapping[Any, Any]) -> bool:
    try:
        rebuilt = kind(dict(example))
        able = len(rebuilt) == len(example) and all(rebuilt[k] is v for k, v in example.items())
    except Exception:  # its constructor takes something else
        return False
    if able:
        pytree.register_pytree_node(
            kind,
            lambda m: (list(m.values()), list(m)),
            lambda values, keys: kind(dict(zip(keys, values, strict=True))),
            serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
            flatten_with_keys_fn=lambda m: ([(pytree.MappingKey(k), v) for k, v in m.items()], list(m)),
        )
    return able


class State(NamedTuple):
    """What a captured graph depends on besides the inputs.

    Args:
        identities: which parameters and buffers there are.
        rest: their dtypes, devices and requires_grad, and the modules' other attributes: train or eval, flags that a
            forward pass may read.
        autocast: the device types that it is on for, with its dtypes.
    """

    identities: tuple[int, ...]
    rest: tuple[Any, ...]
    autocast: tuple[Any, ...]


class StateReader:
    """Reads the state of a model at every call; in full only where something has changed since the last time."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._last: _Snapshot | None = None

    def __call__(self) -> State:
        last = self._last
        if last is None or not last.holds():
            last = self._last = _Snapshot(self._model)
        return State(last.identities, last.rest, autocast_state())


class _Snapshot:
    """The modules' dictionaries as they were, compared without a Python loop over their entries."""

    def __init__(self, model: nn.Module) -> None:
        self._dicts: list[dict[str, Any]] = []
        self._places: tuple[list[Any], list[Any], list[Any]] = ([], [], [])  # a dict, a key, the value there
        self._containers: list[tuple[Any, Any]] = []  # a value that may change in place, what it held
        self._tensors: list[torch.Tensor] = []
        rest: list[Any] = []
        known: set[int] = set()
        for module in _modules(model):
            own = vars(module)
            rest.append(type(module))
            tables = [own[name] for name in _READ]
            self._dicts += [own, *tables]
            for name, value in list(own.items()):  # a list: another thread may be setting one
                if name not in _TABLES:
                    self._note(own, name, value)
                    if _fixed(value):
                        rest.append(value)
                    elif id(value) not in known:  # every layer may hold the same config
                        known.add(id(value))
                        self._containers.append((value, _plain(value, _DEPTH)))
            for table in tables:
                for name, value in list(table.items()):
                    self._note(table, name, value)
                    if isinstance(value, torch.Tensor):
                        self._tensors.append(value)
                    elif not isinstance(value, nn.Module):
                        rest.append(id(value))  # a hook
        self._lengths = list(map(len, self._dicts))
        self._kinds = self._read_kinds()
        self.identities = tuple(map(id, self._tensors))
        self.rest = (*rest, *self._kinds, *(held for _, held in self._containers))

    def holds(self) -> bool:
        """Whether the model is still like this."""
        dicts, names, values = self._places
        return (
            all(map(operator.is_, map(dict.get, dicts, names), values))
            and list(map(len, self._dicts)) == self._lengths
            and self._read_kinds() == self._kinds
            and all(_plain(value, _DEPTH) == held for value, held in self._containers)
        )

    def _note(self, table: dict[str, Any], name: str, value: Any) -> None:
        for column, entry in zip(self._places, (table, name, value), strict=True):
            column.append(entry)

    def _read_kinds(self) -> list[Any]:
        return [(t.dtype, t.device, t.requires_grad) for t in self._tensors]


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


def _fixed(value: Any) -> bool:
    """Whether an attribute stays what it is as long as it is the same object."""
    return type(value) in _ATOMS or (type(value) is tuple and all(map(_fixed, value)))


def _plain(value: Any, depth: int) -> Any:
    """An attribute as something to compare: what containers and plain objects (a config) hold, else which it is."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if not depth or isinstance(value, torch.Tensor | type | ModuleType):
        return id(value)
    if kind in (list, tuple, set, frozenset):
        return tuple([_plain(v, depth - 1) for v in value])
    if isinstance(value, dict | MappingProxyType):  # another mapping may load what it is asked for
        return tuple([(k, _plain(v, depth - 1)) for k, v in list(value.items())])
    held = getattr(value, "__dict__", None)
    return (id(value), _plain(held, depth - 1)) if held else id(value)


def leaf_key(leaves: Sequence[Any], constant: Collection[int] = ()) -> tuple[Any, ...]:
    """The input signature: everything but the number of samples, of which it says whether they are many.

    Of constant leaves it holds the values too.
    """
    runs = batched(leaves, constant)
    key: list[Any] = [
        (leaf.shape[1:] if over else leaf.shape, leaf.stride()[1:], over, leaf.dtype, leaf.device)
        if isinstance(leaf, torch.Tensor)
        else repr(leaf)
        for leaf, over in zip(leaves, runs, strict=True)
    ]
    return (*key, many_samples(leaves, runs), *((i, *leaves[i].flatten().tolist()) for i in constant))


def many_samples(leaves: Sequence[Any], runs: Sequence[bool]) -> bool:
    """Whether a call brings so many samples, not to a CPU, that tokens are selected another way (`select.way`).

    Args:
        runs: which leaves run over samples, `batched`.
    """
    return any(
        over and leaf.shape[0] > FEW and leaf.device.type != "cpu" for leaf, over in zip(leaves, runs, strict=True)
    )


def batch_sizes(leaves: Sequence[Any]) -> tuple[int, ...]:
    """The first size of every tensor among the inputs."""
    return tuple(leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim())


def in_words(leaves: Sequence[Any], constant: Collection[int] = ()) -> str:
    """The input signature for a report: `float32[B, 3, 224, 224] on cpu`."""
    texts = []
    for i, (t, over) in enumerate(zip(leaves, batched(leaves, constant), strict=True)):
        if not isinstance(t, torch.Tensor):
            continue
        sizes = ", ".join("B" if over and d == 0 else str(s) for d, s in enumerate(t.shape))
        held = f", always {t.tolist()}" if i in constant else ""
        texts.append(f"{str(t.dtype).removeprefix('torch.')}[{sizes}] on {t.device}{held}")
    return ", ".join(texts)


class Call(NamedTuple):
    """The inputs of one call of a model.

    Args:
        leaves: flat.
        constant: which of them the graph has the values of.
        key: the input signature, and how the leaves are nested.
    """

    args: Any
    kwargs: Any
    leaves: list[Any]
    constant: tuple[int, ...]
    key: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module, args: Any, kwargs: Any, names: Collection[str] = ()) -> Call:
        """Reads a call's inputs; see `constant_leaves`."""
        leaves, spec = flatten(args, kwargs)
        constant = constant_leaves(model, args, kwargs, names)
        return cls(args, kwargs, leaves, constant, (leaf_key(leaves, constant), spec))
