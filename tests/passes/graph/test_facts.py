"""Typed entries of `meta`: one way in, and copies of a graph keep them."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
from graphs import graph_of

from passes.graph.facts import Fact

NUMBER: Fact[int] = Fact("a number of the test")
TORCHS = {"val", "stack_trace", "nn_module_stack", "torch_fn", "example_value", "tensor_dict"}  # keys that torch writes
ROOT = Path(__file__).parents[3]


def test_a_fact_is_noted_read_and_forgotten() -> None:
    gm = graph_of(lambda x: x * 2)
    assert not NUMBER.known(gm) and NUMBER.get(gm) is None
    with pytest.raises(KeyError):
        NUMBER.of(gm)
    assert NUMBER.first(gm, 1) == 1 and NUMBER.first(gm, 2) == 1
    NUMBER.put(gm, 3)
    other = copy.copy(gm)
    other.meta = dict(gm.meta)
    assert NUMBER.take(gm) == 3 and not NUMBER.known(gm)
    assert NUMBER.of(other) == 3
    NUMBER.forget(other)
    NUMBER.forget(other)
    assert not NUMBER.known(other)


def test_nothing_else_has_keys_of_its_own() -> None:
    """Nor do two facts share a name."""
    names, seen = [], 0
    for path in [*(ROOT / "passes").rglob("*.py"), *(ROOT / "rs_compile").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            key: ast.expr | None = None
            if isinstance(node, ast.Subscript) and _is_meta(node.value):
                key = node.slice
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_meta(node.func.value):
                key = node.args[0] if node.func.attr in {"get", "pop", "setdefault"} else None
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Fact":
                names.append(ast.literal_eval(node.args[0]))
            if key is not None and path.name != "facts.py":
                seen += 1
                own = isinstance(key, ast.Name) and key.id.isupper()  # a constant, as facts were once
                own |= isinstance(key, ast.Constant) and key.value not in TORCHS
                assert not own, f"{path}:{node.lineno}"
    assert seen > 50 and len(names) > 15 and len(set(names)) == len(names)


def _is_meta(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "meta"
