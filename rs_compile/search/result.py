"""What a search found: the schedule, everything tried, and what is true on pictures that nothing was chosen on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from tabulate import tabulate

from rs_compile.drift import shown
from rs_compile.schedule import Schedule
from rs_compile.search.page import save_page
from rs_compile.search.plot import draw
from rs_compile.search.rows import Row


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        target: what was asked.
        winner: the row of the schedule; `schedule` is it.
        rows: everything tried.
        metric: what drift is.
        macs_dense: multiply-accumulates of one picture in the dense model.
        searched, held: pictures on which was searched, and on which is reported.
        batch: pictures of a timed call.
        verdict: in a sentence or two, whether the target was met and how sure the choice is.
        settings: model, seed, backend, threads.
    """

    target: str
    winner: Row
    rows: tuple[Row, ...]
    metric: str
    macs_dense: int
    searched: int
    held: int
    batch: int
    verdict: str
    settings: dict[str, Any]

    @property
    def schedule(self) -> Schedule:
        """Goes into `optimize` as it is."""
        return self.winner.schedule

    @property
    def best(self) -> tuple[Row, ...]:
        """Of each method the row with least drift on the pictures searched on, at the winner's cost."""
        near = [r for r in self.rows if r.held_drift is not None]
        return tuple(sorted(near, key=lambda r: r.held_drift or 0.0))

    @property
    def front(self) -> tuple[Row, ...]:
        """The Pareto front of all rows: no other is cheaper and drifts less; the cheapest first."""
        found: list[Row] = []
        for row in sorted((r for r in self.rows if r.drift is not None), key=lambda r: (r.macs, r.drift or 0.0)):
            if not found or (row.drift or 0.0) < (found[-1].drift or 0.0):
                found.append(row)
        return tuple(found)

    def __str__(self) -> str:
        agreement = any(r.agreement is not None for r in self.rows)
        heads = ["", "method", "spread", "MACs", f"{self.metric}: searched on", "held out"]
        heads += ["same class, held out"] if agreement else []
        heads += ["speed-up"]
        lines = []
        timed = [r for r in self.rows if r.speedup is not None and r.held_drift is None]  # and not chosen
        for row in (*self.best, *timed):
            cells = [
                "*" if row is self.winner else "",
                row.method,
                row.shape,
                f"{row.macs / self.macs_dense:.3f}",
                _drift(row.drift, row.error),
                _drift(row.held_drift, row.held_error),
            ]
            cells += [_share(row.held_agreement)] if agreement else []
            lines.append([*cells, str(row.speedup or "")])
        table = tabulate(lines, heads, disable_numparse=True)
        refused = [f"  {r.method}: {r.refused.splitlines()[0]}" for r in self.rows if r.refused and not r.macs]
        notes = ["does not fit the model:", *dict.fromkeys(refused)] if refused else []
        size = f"{self.searched} pictures searched on, {self.held} held out; {len(self.rows)} schedules tried"
        return "\n".join(
            [f"{self.settings['model']}: {self.target}", table, *notes, size, self.verdict, self.schedule.to_json()]
        )

    def to_json(self) -> str:
        """The same content, with every row; the winner's schedule under "schedule"."""
        content = {
            "target": self.target,
            "schedule": json.loads(self.schedule.to_json()),
            "verdict": self.verdict,
            "metric": self.metric,
            "macs_dense": self.macs_dense,
            "searched": self.searched,
            "held": self.held,
            "batch": self.batch,
            "settings": self.settings,
            "winner": self.rows.index(self.winner),
            "front": [self.rows.index(row) for row in self.front],
            "rows": [row.to_dict() for row in self.rows],
        }
        return json.dumps(content, indent=2)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws drift against multiply-accumulates into a .png, .svg or .pdf file; needs matplotlib."""
        title = f"{self.settings['model']}: {self.target}; rings searched on, squares held out"
        draw(Path(path), title, self.metric, self.macs_dense, self.rows, self.front, self.winner)

    def to_html(self, path: str | PathLike[str]) -> None:
        """Writes every candidate and the Pareto front as a page, one file that needs nothing else.

        Raises:
            CompileError: the file cannot be written.
        """
        words = {name: getattr(self, name) for name in ("target", "metric", "searched", "held", "verdict")}
        save_page(path, self.settings, self.macs_dense, self.rows, self.front, self.winner, **words)


def _drift(value: float | None, error: float | None) -> str:
    return "" if value is None else shown(value, error or 0.0)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"
