"""Inputs that the model's Python code reads: their values become part of the graph.

torch.export stops where code asks for the data of an input (`grid.tolist()`, lengths to split by). Where the caller
says that an input is the same from call to call, the model is captured with it held fast, and what is computed from it
and from numbers alone is computed while it is captured, as on any other call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from passes.graph.aliasing import Memory, writes

LARGEST = 1024  # entries; their values are compared at every call
_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_FACTORIES = frozenset(
    {torch.arange, torch.zeros, torch.ones, torch.full, torch.tensor, torch.as_tensor, torch.eye, torch.linspace}
)


def input_names(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """For each flat input leaf the names that it goes by: its argument, and the keys of the mappings that it is in."""
    parameters = list(inspect.signature(model.forward).parameters)
    named = []
    for path, _ in pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))[0]:
        keys = [str(k.key) for k in path if isinstance(k, pytree.MappingKey)]
        # (args, kwargs), and in args the place of the argument
        at = [k.idx for k in path[:2] if isinstance(k, pytree.SequenceKey)]
        named.append((*parameters[at[1] : at[1] + 1], *keys) if at[0] == 0 else tuple(keys))
    return named


def is_small(leaf: Any) -> bool:
    """Whether a leaf is a tensor of few whole numbers or booleans."""
    whole = isinstance(leaf, Tensor) and not (leaf.is_floating_point() or leaf.is_complex())
    return whole and leaf.numel() <= LARGEST


class HeldFast(nn.Module):
    """Stands in for a model while it is captured: some of its inputs have the values of the example.

    It has the inputs of the model and shares its tables, so that the graph is that of the model itself.

    Args:
        model: the model.
        values: by flat input leaf the value that it always has.
    """

    held: tuple[int, ...]  # those leaves
    written: Callable[[], bool]  # whether the model wrote into one of the values

    def __init__(self, model: nn.Module, values: Mapping[int, Tensor]) -> None:
        super().__init__()
        for table in _TABLES:
            self.__dict__[table] = model.__dict__[table]
        self.training = model.training
        held = {i: value.detach().clone() for i, value in values.items()}

        @functools.wraps(model.forward)  # export names inputs after the arguments
        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            args, kwargs = pytree.tree_unflatten([held.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
            with _Known(held.values()):
                return model(*args, **kwargs)

        self.__dict__["forward"] = forward
        self.__dict__["held"] = tuple(held)
        self.__dict__["written"] = lambda: any(value._version for value in held.values())


class _Random(Exception):
    """An op draws random numbers."""


class _Drawing(TorchDispatchMode):
    """Stops at an op that draws random numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _Random
        return func(*args, **(kwargs or {}))


class _Known(TorchFunctionMode):
    """Runs for real, unrecorded, what is computed from known tensors and numbers alone; results are known as well."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {id(t): t for t in tensors}
        self._shown: dict[int, tuple[int, Tensor]] = {}  # version, and what the graph holds of it

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        known = all(id(t) in self._known for t in tensors) and not any(isinstance(x, torch.SymInt) for x in leaves)
        if known and (tensors or func in _FACTORIES):
            try:
                with torch._C.DisableTorchFunction(), _disable_current_modes(), _Drawing():
                    out = func(*args, **kwargs)
            except _Random:
                return func(*args, **kwargs)
            self._known |= {id(t): t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)}
            return out
        if func is Tensor.__getitem__:
            args = (args[0], self._counted(args[1]))
        args, kwargs = pytree.tree_map_only(Tensor, self._as_constant, (args, kwargs))
        return func(*args, **kwargs)

    def _counted(self, index: Any) -> Any:
        """An index with the places in a known mask for the mask, so that the graph knows how many entries it picks."""
        parts = list(index) if isinstance(index, tuple) else [index]
        if not any(self._is_mask(part) for part in parts):
            return index
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            places = {id(part): part.nonzero(as_tuple=True) for part in parts if self._is_mask(part)}
        self._known |= {id(place): place for found in places.values() for place in found}
        return tuple(place for part in parts for place in places.get(id(part), (part,)))

    def _is_mask(self, part: Any) -> bool:
        return isinstance(part, Tensor) and id(part) in self._known and part.dtype == torch.bool and part.dim() > 0

    def _as_constant(self, tensor: Tensor) -> Tensor:
        """What the graph reads of a known tensor: a copy, for the model's code may go on writing into it."""
        if id(tensor) not in self._known:
            return tensor
        version, copy = self._shown.get(id(tensor), (-1, tensor))
        if version != tensor._version:
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                copy = tensor.detach().clone()
            self._shown[id(tensor)] = tensor._version, copy
        return copy


def written_constant(gm: GraphModule, model: nn.Module) -> Node | None:
    """The first op that writes into a value that was known at capture: what is written then would be lost."""
    tables = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    owned = {name for table in tables for name, _ in table}
    memory: Memory | None = None
    node: Node
    for node in gm.graph.nodes:
        for value in writes(node):
            memory = memory or Memory(gm.graph)
            if any(n.op == "get_attr" and str(n.target) not in owned for n in memory.members(value)):
                return node
    return None
