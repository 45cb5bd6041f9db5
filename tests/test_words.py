"""Scans of the source: messages of refusals that no test mentions, libraries that passes know by name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = 3  # words in a row that a test must have of a message


def test_no_message_is_without_a_test() -> None:
    tested = {run for path in (ROOT / "tests").rglob("*.py") for text in texts(path) for run in runs(text)}
    for words in re.findall(r'refused\("RSC-\d+", "(.*?)"', (ROOT / "docs" / "troubleshooting.md").read_text()):
        tested |= runs(words)
    names = errors()
    seen, without = 0, []
    for path in [*(ROOT / "passes").rglob("*.py"), *(ROOT / "rs_compile").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names):
                continue
            said = {run for argument in node.args[:1] for text in pieces(argument) for run in runs(text)}
            seen += bool(said)
            if said and not said & tested:
                without.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert seen > 200 and without == []


def test_passes_name_no_library() -> None:
    """They know graphs; what one library does is prose that goes out of date, or a special case."""
    names = re.compile(r"\b(timm|transformers|torchvision|open_clip|diffusers|hugging ?face)\b", re.IGNORECASE)
    found = {str(path): names.findall(path.read_text()) for path in (ROOT / "passes").rglob("*.py")}
    assert len(found) > 100 and {path: words for path, words in found.items() if words} == {}


def errors() -> set[str]:
    """The names of all classes of refusals, but of those that say a pass is wrong."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for folder in ("passes", "rs_compile")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    found: set[str] = set()
    while more := {n for n, of in bases.items() if of & (found | {"CompileError"})} - found - {"PassError"}:
        found |= more
    return found | {"CompileError"}


def texts(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.split(r"\.[*+]|\\n|\n", node.value)


def pieces(node: ast.expr) -> Iterator[str]:
    """What stands in a message whatever is put into it."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield from part.value.splitlines()


def runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}
