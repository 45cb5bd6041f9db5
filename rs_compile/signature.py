"""What a call brings: its inputs, flat, and the part of a plan's key that they are; `state.py` has the other part."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from passes.capture.capture import batched
from passes.capture.constant_inputs import LARGEST, input_names, is_small
from passes.graph.base import CompileError
from passes.graph.codes import Code
from passes.sites.select import FEW


class InputError(CompileError, TypeError):
    """The model was called with something that cannot be captured; says what was expected."""

    family = Code.INPUTS


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
        over and leaf.device.type != "cpu" and leaf.shape[0] > FEW for leaf, over in zip(leaves, runs, strict=True)
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
