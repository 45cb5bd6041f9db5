"""The parts of a report, which Markdown and a page are written of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tabulate import tabulate


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Args:
        title: above it.
        heads, lines: its cells, as text; no table where there are no lines.
        verdicts: what it decides, each a sentence; also shown at the top of the report.
        notes: what a reader must know about it.
        svg: pictures below it, elements of a page.
    """

    title: str
    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    verdicts: Sequence[str] = ()
    notes: Sequence[str] = ()
    svg: Sequence[str] = field(default=())

    def markdown(self) -> str:
        """The table with its verdicts; pictures are left out."""
        # a bar would end a cell
        lines = [[cell.replace("|", "\\|") for cell in line] for line in self.lines]
        body = tabulate(lines, self.heads, tablefmt="github", disable_numparse=True) if lines else ""
        verdicts = "\n".join(f"- **{verdict}**" for verdict in self.verdicts)
        return "\n\n".join(part for part in (f"## {self.title}", verdicts, body, *self.notes) if part)
