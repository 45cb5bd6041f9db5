"""What `import rs_compile` pulls in, and that its names are there all the same."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rs_compile

HEAVY = ("sympy", "timm", "torchvision", "transformers", "rich", "tabulate", "matplotlib", "sklearn", "PIL", "triton")
HEAVY += ("torch.export", "torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes")


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_pulls_in_nothing_heavy() -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import rs_compile
print(*(name for name in {HEAVY!r} if name in set(sys.modules) - before), len(set(sys.modules) - before) < 10)
"""
    assert fresh(code) == "True"


def test_the_functions_are_there_whatever_was_imported_first() -> None:
    code = """
from rs_compile.planning import plans
import rs_compile
print(rs_compile.optimize.__name__, callable(rs_compile.optimize), set(rs_compile.__all__) <= set(dir(rs_compile)))
"""
    assert fresh(code) == "optimize True True"


def test_every_public_name_is_found_where_it_says() -> None:
    assert sorted(rs_compile._HOME) == sorted(rs_compile.__all__)
    for name in rs_compile.__all__:
        assert getattr(rs_compile, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(rs_compile, "optimise")


@pytest.mark.parametrize("package", ["bench", "passes", "rs_compile"])
def test_no_module_imports_itself_in_a_circle(package: str) -> None:
    """Counted wherever an import stands, in functions too."""
    root = Path(__file__).parent.parent
    files = {".".join(file.relative_to(root).with_suffix("").parts): file for file in root.glob(f"{package}/**/*.py")}
    names = {name.removesuffix(".__init__") for name in files}
    reads: dict[str, set[str]] = {}
    for name, file in files.items():
        own = reads[name.removesuffix(".__init__")] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                own |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & names - {package}
            elif isinstance(node, ast.Import):
                own |= {alias.name for alias in node.names} & names - {package}
    reads = {name: own - {name} for name, own in reads.items()}  # a package and what stands in it
    assert sum(map(len, reads.values())) > 20  # it has found them
    while ready := {name for name, own in reads.items() if not own}:
        reads = {name: own - ready for name, own in reads.items() if name not in ready}
    assert not reads
