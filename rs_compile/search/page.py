"""A search as a page: every candidate as a point, drift against multiply-accumulates, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rs_compile.pages import write_page
from rs_compile.search.rows import Row

_MARGIN = 4.0  # percent of the plot, at each side
_LEAST = 1e-9  # a drift of nothing has no logarithm


@dataclass(frozen=True)
class Axis:
    """One side of a plot, from `low` to `high`, in percent of its length."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], log: bool = False) -> Axis:
        low, high = min(values), max(values)
        if low == high:
            low, high = (low / 2, low * 2) if log else (low - 0.05, low + 0.05)
        return cls(low, high, log)

    def at(self, value: float) -> float:
        """Where a value lies."""
        low, high, value = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return _MARGIN + (100 - 2 * _MARGIN) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers along it: 1, 2 and 5 times powers of ten, or even steps."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            found = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
            found = found if last - first <= 3 else [10.0**e for e in range(first, last + 1)]
            if len(on := self._on(found)) > 1:
                return on
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough)
        return self._on([step * i for i in range(math.floor(self.low / step), math.ceil(self.high / step) + 1)])

    def _on(self, ticks: Sequence[float]) -> list[float]:
        """Those that lie on it."""
        return [tick for tick in ticks if (tick > 0 or not self.log) and 0 <= self.at(tick) <= 100]


@dataclass(frozen=True)
class Point:
    """A candidate in the plot: its place in percent, 0 at the left and at the bottom.

    Args:
        held: its height by drift on held-out pictures; None where that was not measured.
        kind: of its method, counted from 0: the colour.
    """

    row: Row
    x: float
    y: float
    held: float | None
    kind: int
    front: bool
    winner: bool


def save_page(
    path: Any,
    settings: Mapping[str, Any],
    macs_dense: int,
    rows: Iterable[Row],
    front: Sequence[Row],
    winner: Row,
    **words: Any,
) -> None:
    """Writes the page.

    Args:
        path: of the HTML file.
        settings, macs_dense, rows, front, winner: see `SearchResult`.
        words: what else the template prints.

    Raises:
        CompileError: the file cannot be written.
    """
    rows = list(rows)
    ran = sorted((r for r in rows if r.drift is not None), key=lambda r: (r.macs, r.drift or 0.0))
    drifts = [max(d, _LEAST) for r in ran for d in (r.drift, r.held_drift) if d is not None]
    across, up = Axis.around([r.macs / macs_dense for r in ran]), Axis.around(drifts, log=True)
    methods = list(dict.fromkeys(r.method for r in rows if r.drift is not None))

    def high(drift: float | None) -> float | None:
        return None if drift is None else up.at(max(drift, _LEAST))

    points = [
        Point(r, across.at(r.macs / macs_dense), high(r.drift) or 0.0, high(r.held_drift), methods.index(r.method),
              any(r is f for f in front), r is winner)
        for r in ran
    ]  # fmt: skip
    write_page(
        path,
        "search.html",
        scripts=("search.js",),
        settings=settings,
        macs_dense=macs_dense,
        points=points,
        methods=methods,
        winner=winner,
        refused={r.method: r.refused for r in rows if r.refused and not r.macs},
        dear=sum(1 for r in rows if r.drift is None and r.macs),
        across=across,
        up=up,
        **words,
    )
