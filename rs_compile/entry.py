"""Methods of a model beside forward: `forward_features`, `get_image_features`, captured as if they were its forward."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class Entry(nn.Module):
    """A model whose forward is another of its methods; it shares the model's tables, so that names are the same.

    Args:
        model: the model.
        method: the name of one of its methods.
    """

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        for table in _TABLES:
            self.__dict__[table] = model.__dict__[table]

        @functools.wraps(getattr(model, method))  # export names inputs after the arguments
        def forward(*args: Any, **kwargs: Any) -> Any:
            return getattr(model, method)(*args, **kwargs)

        self.__dict__["forward"] = forward


def check_methods(model: nn.Module, names: Sequence[str]) -> None:
    """Refuses names that are no methods of the model's.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        if name == "forward" or not public_method(model, getattr(model, name, None)):
            able = [n for n in dir(type(model)) if public_method(model, getattr(model, n, None)) and n != "forward"]
            raise ValueError(
                f"method names {name!r}, and forward is always pruned; beside it {type(model).__name__} has "
                f"{', '.join(able) or 'no method of its own'}"
            )


def public_method(model: nn.Module, value: Any) -> bool:
    """Whether an attribute of a model is a method of its own class, not of every module's."""
    named = inspect.ismethod(value) and value.__self__ is model and not value.__name__.startswith("_")
    return named and not hasattr(nn.Module, value.__name__)


def watched(model: nn.Module, method: Callable[..., Any], warned: set[str]) -> Callable[..., Any]:
    """A method of the model, which warns once where it runs layers on tensors: nothing is pruned there.

    Args:
        warned: the names that it was said of.
    """
    name = method.__name__

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        out = method(*args, **kwargs)
        if name not in warned and _tensors((args, kwargs)) and _tensors(out) and _runs_layers(model, method):
            warned.add(name)
            warnings.warn(
                f"{type(model).__name__}.{name} ran as the model has it: nothing was pruned. To prune there too: "
                f'rs_compile.optimize(model, schedule, method="{name}")',
                stacklevel=2,
            )
        return out

    return run


def _tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _runs_layers(model: nn.Module, method: Callable[..., Any]) -> bool:
    """Whether code that names children of the model names one that holds layers; a head alone has none."""
    children = {name: model._modules[name] for name in _names(model, method, set()) if name in model._modules}
    return not children or any(child is not None and _layered(child) for child in children.values())


def _names(model: nn.Module, method: Callable[..., Any], seen: set[str]) -> Iterator[str]:
    """What a method's code names, and the methods of the model that it names."""
    code = getattr(inspect.unwrap(method), "__code__", None)
    for name in () if code is None else code.co_names:
        if name not in seen:
            seen.add(name)
            yield name
            inner = getattr(type(model), name, None)
            if inspect.isfunction(inner) and not hasattr(nn.Module, name):
                yield from _names(model, inner, seen)


def _layered(module: nn.Module) -> bool:
    """Whether somewhere in it two modules of one class, with modules in them, stand side by side."""
    for inner in module.modules():
        kinds = [type(child) for child in inner.children() if child._modules]
        if len(set(kinds)) < len(kinds):
            return True
    return False
