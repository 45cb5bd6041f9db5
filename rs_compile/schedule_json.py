"""A schedule as JSON, with the version of the form and of the rs_compile that wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from passes.graph.base import ScheduleError
from passes.sites.attention_scores import SCORES
from passes.sites.grid_prune import GridPrune
from passes.sites.mergers import MERGERS

VERSION = 1  # of the form
_WRITER = "rs_compile"  # key of the version that wrote it
_TABLES = ("keep", "merge", "grid")
_PRUNED = "pruned"  # of DiffRate: by block
_KINDS: dict[str, Mapping[str, type]] = {"score": SCORES, "importance": SCORES, "by": MERGERS}


def written(values: Mapping[str, Any]) -> str:
    """One line of JSON of a schedule's fields; what nothing reads is left out."""
    out: dict[str, Any] = {"version": VERSION, _WRITER: our_version()}
    for name, value in values.items():
        if name in _TABLES:
            out[name] = {str(i): asdict(v) if isinstance(v, GridPrune) else v for i, v in value.items()}
        else:
            out[name] = _coded(value) if name in _KINDS else value
    if not values["merge"]:
        del out["by"]
    elif not (values["keep"] or values["grid"]):
        del out["score"]
    return json.dumps(out)


def read(text: str, known: Sequence[str]) -> dict[str, Any]:
    """The fields of a schedule that JSON gives.

    Args:
        known: the fields that there are.

    Raises:
        ScheduleError: no such JSON, an unknown or a repeated key, or another version of the form.
    """
    try:
        values = json.loads(text, object_pairs_hook=_no_repeats)
    except json.JSONDecodeError as error:
        raise ScheduleError(
            f'the schedule is no JSON ({error}); write an object like {{"keep": {{"0": 0.8}}}}'
        ) from None
    if not isinstance(values, dict):
        raise ScheduleError(f'the schedule is {text.strip()}; write an object like {{"keep": {{"0": 0.8}}}}')
    form, writer = values.pop("version", VERSION), values.pop(_WRITER, None)
    by = "" if writer is None else f", which rs_compile {writer} wrote (this is {our_version()})"
    if form != VERSION:
        raise ScheduleError(f"version {form!r} of the schedule{by}; write it anew in version {VERSION}, or update")
    if unknown := sorted(values.keys() - set(known)):
        raise ScheduleError(
            f"unknown key {', '.join(map(repr, unknown))} in the schedule{by}; remove it, "
            f"the keys are {', '.join(known)}"
        )
    if values and not values.keys() & set(_TABLES):
        raise ScheduleError('the schedule has no keep, merge or grid; write "keep": {"0": 0.8}')
    for name in values.keys() & set(_TABLES):
        if not isinstance(of := values[name], dict):
            raise ScheduleError(f'{name} is {of!r} in the schedule; write an object like "keep": {{"0": 0.8}}')
        values[name] = by_index(of.items(), name)
    values["grid"] = {i: _made(GridPrune, cut, f"grid of stage {i}") for i, cut in values.get("grid", {}).items()}
    return {name: _decoded(name, value) if name in _KINDS else value for name, value in values.items()}


def by_index(pairs: Iterable[tuple[str, Any]], table: str = "keep") -> dict[int, Any]:
    """Values by their index, which comes as text, of one of a schedule's tables."""
    values: dict[int, Any] = {}
    for text, value in pairs:
        if not (text.isascii() and text.isdecimal() and str(int(text)) == text):
            raise ScheduleError(
                f"{item(table)} index {text!r} in {table}; write an integer of at least 0, counted from 0"
            )
        if int(text) in values:
            twice = {"keep": "keep ratios", "merge": "merge counts", "grid": "grid prunes", _PRUNED: "counts"}[table]
            raise ScheduleError(f"{item(table)} {text} has two {twice}; keep one of them")
        values[int(text)] = value
    return values


def item(table: str) -> str:
    """What the indices of a table count."""
    return "stage" if table == "grid" else "block"


def our_version() -> str:
    """Of this rs_compile."""
    try:
        return version("rs-compile")
    except PackageNotFoundError:
        return "of a checkout that is not installed"


def _coded(value: Any) -> dict[str, Any]:
    """A score or a merger: its kind, and its own fields."""
    own = {f.name: getattr(value, f.name) for f in fields(value)}
    coded = {name: _coded(v) if name in _KINDS else v for name, v in own.items()}
    by_block = {name: {str(i): n for i, n in v.items()} for name, v in coded.items() if name == _PRUNED}
    return {"kind": value.kind} | coded | by_block


def _decoded(name: str, values: Any) -> Any:
    kinds = _KINDS[name]
    kind = values.get("kind") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        said = f"has the kind {kind!r}" if isinstance(values, dict) else f"is {values!r}"
        raise ScheduleError(f"{name} {said}; write an object with a kind of {', '.join(map(repr, kinds))}")
    own = {k: _decoded(k, v) if k in _KINDS else v for k, v in values.items() if k != "kind"}
    if isinstance(of := own.get(_PRUNED), dict):
        own[_PRUNED] = by_index(of.items(), _PRUNED)
    return _made(kinds[kind], own, f"{name} {kind!r}")


def _made(kind: type, values: Any, what: str) -> Any:
    known = [field.name for field in fields(kind)]
    if not isinstance(values, dict) or (unknown := sorted(values.keys() - set(known))):
        fault = f"{values!r}" if not isinstance(values, dict) else f"unknown key {', '.join(map(repr, unknown))}"
        raise ScheduleError(f"{what}: {fault}; write an object with the keys {', '.join(known) or 'kind alone'}")
    return kind(**values)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ScheduleError(f"key {key!r} stands twice in the schedule; keep one of them")
        values[key] = value
    return values
