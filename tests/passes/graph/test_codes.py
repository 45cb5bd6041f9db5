"""Every refusal has a code, and a code never changes its meaning."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from passes.axes.rules import Untransferable
from passes.graph.base import CompileError, PassError, Refusal, ScheduleError
from passes.graph.codes import Code

ROOT = Path(__file__).parents[3]
GENERAL = {"CompileError", "Refusal", "Untransferable", "Ungatherable"}  # of many families: each raise names its own
PINNED = """
RSC-101 SCHEDULE, RSC-102 UNREAD_OPTION, RSC-103 NO_SUCH_PART, RSC-104 TOO_MANY, RSC-105 NOT_CALLED, RSC-106 INPUTS,
RSC-201 DOES_NOT_RUN, RSC-202 NOT_TRACED, RSC-203 DATA_DEPENDENT, RSC-204 KEPT_STATE, RSC-205 NOT_THE_MODEL,
RSC-206 SURROUNDED, RSC-301 NO_BLOCK, RSC-302 NOT_A_SEQUENCE, RSC-303 UNKNOWN_ORIGIN, RSC-304 PADDING,
RSC-401 NO_RULE, RSC-402 WRONG_RULE, RSC-403 EVERY_TOKEN, RSC-404 PICKS_A_TOKEN, RSC-405 SAMPLES_MEET,
RSC-406 IN_PLACE, RSC-407 OTHER_SEQUENCE, RSC-408 FORM, RSC-501 FIXED_GRID, RSC-502 NEEDS_THE_MAP,
RSC-601 NO_SCORE, RSC-602 NO_MERGE, RSC-603 SIZES, RSC-604 TRAIN_MODE, RSC-701 OUTPUTS, RSC-702 NO_MAP,
RSC-801 COMMAND, RSC-802 MISSING, RSC-803 MODEL_FILE, RSC-804 EXPORT, RSC-805 PICTURES, RSC-999 FAULT
"""


def trees() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("passes", "rs_compile", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def test_codes_stay_what_they_are() -> None:
    """New ones are added; none is renumbered, renamed or taken away."""
    assert [f"{code.value} {code.name}" for code in Code] == PINNED.replace("\n", " ").strip(" ").split(", ")
    assert all(text.endswith((".", ")")) for code in Code for text in (code.meaning, code.way_out))


def test_each_general_refusal_names_its_family() -> None:
    seen, without, used = 0, [], set()
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Code":
                used.add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in GENERAL:
                seen += 1
                if not any(keyword.arg == "code" for keyword in node.keywords):
                    without.append(f"{name}:{node.lineno}")
    assert seen > 150 and without == []
    assert used == {code.name for code in Code}  # each code has a raise or a class


def test_each_other_error_has_a_family_of_its_own() -> None:
    """A class that names none would be a fault of the compiler, which only `CompileError` and `PassError` are."""
    children: dict[str, list[ast.ClassDef]] = {}
    for _, tree in trees():
        for node in ast.walk(tree):
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                if isinstance(base, ast.Name) and isinstance(node, ast.ClassDef):
                    children.setdefault(base.id, []).append(node)
    errors = [c for c in children["CompileError"] if c.name not in {"Refusal", "PassError"}]
    assert len(errors) > 10
    for error in errors:
        assert any(isinstance(n, ast.Assign) and ast.unparse(n).startswith("family = Code.") for n in error.body), error
    assert PassError.family is Refusal.family is Code.FAULT


@pytest.mark.parametrize(
    "error, shown",
    [
        (CompileError("one", code=Code.FORM), "one [RSC-408]"),
        (ScheduleError("one\n  two"), "one [RSC-101]\n  two"),
        (Refusal("one", None, "two", code=Code.PADDING), "one [RSC-304]\n  way out: two"),
        (Untransferable("a user's rule says"), "a user's rule says [RSC-401]"),
    ],
)
def test_the_code_stands_behind_the_first_line(error: CompileError, shown: str) -> None:
    assert str(error) == shown and error.code in shown and error.code == error.code.value
    assert error.text == shown.replace(f" [{error.code}]", "")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.code) == (shown, error.code)
