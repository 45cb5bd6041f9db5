"""The vision tower of a larger model, a vision-language model say, optimized where it stands."""

from __future__ import annotations

import copy
import functools
import operator
import os
from collections.abc import Mapping
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from rs_compile.errors import TowerError
from rs_compile.optimize import optimize
from rs_compile.schedule import Schedule

NAMES = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")  # PreTrainedModel.get_encoder's
_SHARED = ("_parameters", "_buffers", "_non_persistent_buffers_set")  # so that half() and to() act on both
_TABLES = vars(nn.Module())  # hooks and the like

Model = TypeVar("Model", bound=nn.Module)


def optimize_tower(
    model: Model,
    schedule: Schedule | Mapping[int, float] | str | os.PathLike[str],
    *,
    tower: str | None = None,
    **options: Any,
) -> Model:
    """A copy of a model whose vision tower is optimized; `generate` and all else go through it.

    Every token comes back at its place, so the rest reads as many image tokens as before. The given model is as it was.
    Parameters, buffers and all modules but those on the way to the tower are shared: `half`, `to` and `load_state_dict`
    on either act on both. The modules on the way are shallow copies, with hooks of their own.

    Args:
        model: a model with a vision tower in it, like those of transformers that read images and text.
        schedule: after which blocks of the tower which share of its tokens stays; see `optimize`.
        tower: the path of the tower in the model, "model.vision_tower". None: the outermost module under one of the
            names that transformers gives them: vision_tower, visual, vision_model, vision_encoder, image_tower.
        options: what `optimize` takes, `constant_inputs=("grid_thw",)` for Qwen2.5-VL.

    Returns:
        A model of the same class. Where the tower stood is an `OptimizedModel`: `fast.model.vision_tower.report()`.

    Raises:
        TowerError: no tower was found, or several; `tower` names none; `forward` of a module on the way to it was
            replaced by code that cannot be led to the optimized one.
        ScheduleError, OutputError, TypeError, ValueError: as `optimize`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize_tower takes a torch.nn.Module, not {type(model).__name__}; pass the model itself")
    if options.get("token_outputs", "restore") != "restore":
        raise ValueError("the language model reads every image token; leave token_outputs out")
    found = _named(model, tower) if tower is not None else _found(model)
    whole: Model = _leading_to(model, found, optimize(found, schedule, **options), {})
    return whole


def _found(model: nn.Module) -> nn.Module:
    paths: list[str] = []
    for path, _ in model.named_modules():  # a module before those in it, each once
        if path.rpartition(".")[2] in NAMES and not path.startswith(tuple(f"{p}." for p in paths)):
            paths.append(path)
    if len(paths) == 1:
        return model.get_submodule(paths[0])
    name, call = type(model).__name__, "optimize_tower(model, schedule, tower="
    if paths:
        raise TowerError(
            f"{name} has {len(paths)} vision towers: {', '.join(paths)}\n"
            f'  way out: {call}"{paths[0]}"), and the same on the result for another'
        )
    raise TowerError(
        f"{name} has no module named {', '.join(NAMES)}\n"
        f'  way out: {call}"path.to.it"), or optimize(model, schedule) if it is the tower itself'
    )


def _named(model: nn.Module, path: str) -> nn.Module:
    found: nn.Module | None = dict(model.named_modules(remove_duplicate=False)).get(path)
    if found is None or found is model:
        what = "the model itself" if found is model else "no module of it"
        raise TowerError(
            f"tower is {path!r}, which is {what}\n"
            "  way out: a path among those of model.named_modules(), or optimize(model, schedule) for all of it"
        )
    return found


def _leading_to(module: Any, tower: nn.Module, handle: nn.Module, copies: dict[nn.Module, nn.Module]) -> Any:
    """The module with the handle wherever the tower stands in it: itself where it stands nowhere.

    Args:
        copies: what was given for the modules that were met before, which may stand in several places.
    """
    if module is tower:
        return handle
    if module not in copies:
        inside = {n: child and _leading_to(child, tower, handle, copies) for n, child in module._modules.items()}
        same = all(map(operator.is_, inside.values(), module._modules.values()))
        copies[module] = module if same else _copied(module, inside)
    return copies[module]


def _copied(module: nn.Module, inside: dict[str, Any]) -> nn.Module:
    """A shallow copy with these modules in it, on the same parameters and buffers."""
    copied = type(module).__new__(type(module))
    for name, value in vars(module).items():
        own = name in _TABLES and name not in _SHARED
        copied.__dict__[name] = copy.copy(value) if own else _bound(value, module, copied)
    copied.__dict__["_modules"] = inside
    if "forward" in vars(module) and copied.forward is module.forward:
        raise TowerError(
            f"{type(module).__name__}.forward was replaced on the object, by code that may hold the dense tower\n"
            "  way out: call optimize_tower first (before torch.compile), or put the tower in its place yourself: "
            "model.path.to.it = optimize(model.path.to.it, schedule)"
        )
    return copied


def _bound(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """A method or partial of the old module, as accelerate puts it in the place of forward, on the new one."""
    if isinstance(value, MethodType) and value.__self__ is old:
        return MethodType(value.__func__, new)
    if isinstance(value, functools.partial) and any(a is old for a in value.args):
        args = (new if a is old else a for a in value.args)
        return functools.update_wrapper(functools.partial(value.func, *args, **value.keywords), value)
    return value
