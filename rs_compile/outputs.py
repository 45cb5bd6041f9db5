"""Which of a model's outputs the caller wants, by name or by place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch.utils import _pytree as pytree

from rs_compile.errors import OutputError


def checked(outputs: Any) -> tuple[str | int, ...] | None:
    """The argument of `optimize` as a tuple of names and places; one alone may stand for itself.

    Raises:
        OutputError: it is neither.
    """
    if outputs is None:
        return None
    given = (outputs,) if isinstance(outputs, str | int) else outputs
    wanted = tuple(given) if isinstance(given, Sequence) else ()
    if not wanted or any(isinstance(o, bool) or not isinstance(o, str | int) for o in wanted):
        raise OutputError(
            f'outputs is {outputs!r}; write names or places of what the model returns, like ("pooler_output",) or (0,)'
        )
    return wanted


def kept_leaves(model: str, spec: pytree.TreeSpec, wanted: Sequence[str | int]) -> set[int]:
    """The places of the flat outputs that belong to these.

    Args:
        model: its name, for messages.
        spec: how the model nests its outputs.
        wanted: names, or places counted from 0.

    Raises:
        OutputError: the model returns none of that name, or not so many.
    """
    named = _entries(pytree.tree_unflatten(range(spec.num_leaves), spec))
    if not named:
        raise OutputError(f"outputs names {_listed(wanted)}, and {model} returns one value; leave outputs out")
    places = list(named.values())
    missing = [o for o in wanted if not (o in named or (isinstance(o, int) and 0 <= o < len(places)))]
    if missing:
        raise OutputError(f"outputs names {_listed(missing)}, and {model} returns {_listed(named)}")
    found = [named[o] if o in named else places[int(o)] for o in wanted]
    return {leaf for entry in found for leaf in pytree.tree_leaves(entry) if leaf is not None}


def _entries(returned: Any) -> dict[Any, Any]:
    """What a model returns by name or place, empty where that is one value."""
    if isinstance(returned, Mapping):
        return dict(returned)
    if isinstance(returned, tuple) and hasattr(returned, "_asdict"):
        return dict(returned._asdict())
    if isinstance(returned, tuple | list):
        return dict(enumerate(returned))
    if is_dataclass(returned):
        return {f.name: getattr(returned, f.name) for f in fields(returned)}
    return {}


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))
