"""The parts of a report, written as Markdown and as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from tabulate import tabulate


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Args:
        title: above it.
        heads, lines: its cells, as text; no table where there are no lines.
        verdicts: what it decides, each a sentence; also shown at the top of the report.
        notes: what a reader must know about it.
        svg: pictures below it.
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

    def html(self) -> str:
        """The same with its pictures."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.heads)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>\n" for line in self.lines)
        table = f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
        verdicts = "".join(f'<p class="verdict">{escape(verdict)}</p>' for verdict in self.verdicts)
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        pictures = "".join(f'<div class="wide">{svg}</div>' for svg in self.svg)
        shown = table if self.lines else ""
        return f"<section><h2>{escape(self.title)}</h2>{verdicts}{shown}{notes}{pictures}</section>"
