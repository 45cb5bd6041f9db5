"""`RESULTS.md` and `report.html` of what was measured so far."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from bench.gpu.document import Table
from bench.gpu.journal import Journal, Outcome
from bench.gpu.plan import Step
from rs_compile.pages import write_page

TITLE = "The claims about GPUs, measured"
TINY = "A rehearsal with small stand-ins, one model a step: its numbers and verdicts mean nothing."


def write_report(journal: Journal, steps: Sequence[Step]) -> None:
    """Writes both, from the journal alone."""
    notes = [_environment(journal)]
    if journal.tiny:
        notes.insert(0, TINY)
    results = tables(journal, steps)
    verdicts = [verdict for table in results for verdict in table.verdicts]
    parts = [outcomes(journal, steps), *results]
    head = "\n\n".join([f"# {TITLE}", *notes, "## Verdicts", "\n".join(f"- {v}" for v in verdicts) or "(none yet)"])
    (journal.out / "RESULTS.md").write_text("\n\n".join([head, *(part.markdown() for part in parts)]) + "\n")
    write_page(journal.out / "report.html", "document.html", heading=TITLE, notes=notes, verdicts=verdicts, parts=parts)


def outcomes(journal: Journal, steps: Sequence[Step]) -> Table:
    """What became of each step."""
    lines = []
    for step in steps:
        outcome = journal.outcomes.get(step.name, Outcome("not run"))
        lines.append([step.name, step.title, outcome.state, f"{outcome.seconds:.0f}", outcome.reason])
    return Table("Steps", ("step", "what", "state", "seconds", "why"), lines)


def tables(journal: Journal, steps: Sequence[Step]) -> list[Table]:
    """The tables of all modules with rows, in the order of the plan, with pictures where matplotlib is there."""
    by_module: dict[str, list[Any]] = {}
    for step in steps:
        if rows := journal.rows(step.name):
            by_module.setdefault(step.module, []).extend(rows)
    found = []
    for name, rows in by_module.items():
        module: Any = import_module(name)
        found += module.tables(rows)
    if find_spec("matplotlib") is None:
        return [*found, Table("Plots", (), [], notes=["matplotlib is not installed, so that nothing is drawn."])]
    from bench.gpu.pictures import pictures

    return [*found, *pictures(by_module)]


def _environment(journal: Journal) -> str:
    skipped = ("command", "tiny")
    return "; ".join(f"{key}: {value}" for key, value in journal.environment().items() if key not in skipped)
