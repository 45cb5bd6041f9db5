"""Writes down the casts that an autocast region makes, so that it computes the same without autocast.

No list of ops says what autocast does: each op is run on fake tensors under the region's own autocast and the
casts of its arguments are read off. They are only written down if the op with these casts, without autocast,
runs exactly the same sequence of ATen ops on the same values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from passes.graph.aliasing import bodies, tensors

aten = torch.ops.aten
_KEYS = ("AutocastCPU", "AutocastCUDA")
Autocast = Callable[[], AbstractContextManager[Any]]


class _Log(TorchDispatchMode):
    """Every ATen op that runs, with values numbered in order of appearance."""

    def __init__(self, inputs: list[Any]) -> None:
        super().__init__()
        self.numbers: dict[int, int] = {}
        self.kept: list[torch.Tensor] = []  # alive, so that an id names one tensor
        self.events: list[tuple[Any, ...]] = []
        self.name(inputs)

    def name(self, value: Any) -> Any:
        def number(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return str(leaf)
            self.kept.append(leaf)
            return self.numbers.setdefault(id(leaf), len(self.numbers))

        return tree_map(number, value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = self.name((args, kwargs))
        out = func(*args, **kwargs)
        if func.namespace != "prim":  # queries, not arithmetic: autocast asks for a tensor's device
            made = str([(t.dtype, t.shape) for t in tensors(out)])
            self.events.append((func, *given, self.name(out), made))
        return out


@dataclass(frozen=True)
class _Plan:
    """The explicit form of one op: casts of its flattened arguments, in order of execution; new kwargs."""

    casts: tuple[tuple[int, torch.dtype], ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


def make_casts_explicit(body: GraphModule, inputs: dict[Node, Any], autocast: Autocast) -> str:
    """Rewrites a region's subgraph to compute without autocast what it did with it.

    Args:
        body: the subgraph; changed only on success, as are the gradient regions in it.
        inputs: the fake values of its placeholders.
        autocast: makes the region's autocast context.

    Returns:
        '' on success, or why not.
    """
    plans: list[tuple[Node, _Plan, Any]] = []
    reason = _plan(body, inputs, autocast, plans)
    if not reason:
        for node, plan, leaves in plans:
            _apply(node, plan, leaves)
    return reason


def _plan(body: GraphModule, inputs: dict[Node, Any], autocast: Autocast, plans: list[Any]) -> str:
    def value(leaf: Any) -> Any:
        if not isinstance(leaf, Node):
            return leaf
        if leaf in inputs:
            return inputs[leaf]
        return leaf.meta["val"] if "val" in leaf.meta else attrgetter(str(leaf.target))(body)

    for node in body.graph.nodes:
        for inner in bodies(node):
            # an autocast region in here switches its own casts; any other region's ops see ours
            if node.target is not torch.ops.higher_order.wrap_with_autocast:
                placeholders = inner.graph.find_nodes(op="placeholder")
                operands = node.args[len(node.args) - len(placeholders) :]
                given = {p: value(o) for p, o in zip(placeholders, operands, strict=True)}
                if reason := _plan(inner, given, autocast, plans):
                    return reason
        if isinstance(node.target, OpOverload):
            leaves = [value(leaf) for leaf in tree_flatten((node.args, node.kwargs))[0]]
            plan = _casts(node, node.target, leaves, autocast)
            if plan is None:
                return f"what autocast does to {node.target} cannot be written as casts of its arguments"
            if plan.casts or plan.kwargs:
                plans.append((node, plan, leaves))
    return ""


def _casts(node: Node, op: OpOverload, leaves: list[Any], autocast: Autocast) -> _Plan | None:
    spec = tree_flatten((node.args, node.kwargs))[1]
    mode = next((t.fake_mode for t in tensors(leaves) if hasattr(t, "fake_mode")), None) or FakeTensorMode()

    def run(context: AbstractContextManager[Any], plan: _Plan) -> list[tuple[Any, ...]] | None:
        fresh = {id(t): _stand_in(t, mode) for t in tensors(leaves)}  # an in-place op may change them
        given = [fresh[id(x)] if isinstance(x, torch.Tensor) else x for x in leaves]
        try:
            with mode, torch.no_grad(), _Log(given) as log, context:
                for position, dtype in plan.casts:
                    given[position] = given[position].to(dtype)
                args, kwargs = tree_unflatten(given, spec)
                out = op(*args, **{**kwargs, **dict(plan.kwargs)})
        except Exception:
            return None  # an op that cannot be replayed proves nothing
        return [*log.events, ("returns", log.name(out))]

    under = run(autocast(), _Plan())
    if under is None:
        return None
    return next((plan for plan in _candidates(op, leaves, under) if run(nullcontext(), plan) == under), None)


def _stand_in(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    return tensor.detach() if hasattr(tensor, "fake_mode") else mode.from_tensor(tensor)


def _candidates(op: OpOverload, leaves: list[Any], under: list[tuple[Any, ...]]) -> list[_Plan]:
    casts: list[tuple[int, torch.dtype]] = []
    numbers: dict[int, int] = {}
    number_of = [numbers.setdefault(id(x), len(numbers)) if isinstance(x, torch.Tensor) else None for x in leaves]
    for func, *event in under:
        if func is not aten._to_copy.default or set(event[1]) != {"dtype"} or event[0][0] not in number_of:
            break
        (source, *_), options = event[:2]
        taken = {position for position, _ in casts}
        place = next((i for i, n in enumerate(number_of) if n == source and i not in taken), None)
        if place is None:
            break
        casts.append((place, getattr(torch, options["dtype"].removeprefix("torch."))))
    # C++ evaluates the casts from the last argument to the first, which matters where one value comes twice
    places = sorted((place for place, _ in casts), reverse=True)
    backwards = [(place, dtype) for place, (_, dtype) in zip(places, casts, strict=True)]
    plans = [_Plan(tuple(c)) for c in (casts, backwards, *(casts[:n] for n in range(1, len(casts)))) if c]
    # only a guess at what is tried first: an op that is known to autocast fails where it gets mixed dtypes
    known = any(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), k) for k in _KEYS)
    plans.insert(len(plans) if known else 0, _Plan())
    names = [a.name for a in op._schema.arguments]
    if "dtype" in names:
        plans.append(_Plan(kwargs=(("dtype", torch.float32),)))
    return plans


def _apply(node: Node, plan: _Plan, values: list[Any]) -> None:
    leaves, spec = tree_flatten((node.args, node.kwargs))
    for position, dtype in plan.casts:
        with node.graph.inserting_before(node):
            cast = node.graph.call_function(aten.to.dtype, (leaves[position], dtype))
        cast.meta = copy.copy(node.meta)
        cast.meta["val"] = values[position].to(dtype)
        leaves[position] = cast
    args, kwargs = tree_unflatten(leaves, spec)
    node.args, node.kwargs = args, {**kwargs, **dict(plan.kwargs)}
