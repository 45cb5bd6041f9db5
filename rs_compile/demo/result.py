"""The demo's table: `str()` to read, `to_json()` to keep."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from rs_compile.timing import Spread

OURS, RANDOM = "shift", "random"


@dataclass(frozen=True)
class Row:
    """One budget.

    Args:
        keep: the keep ratio after each block where tokens leave.
        tokens: of a picture, at the start and after each of these blocks.
        gflops: of a picture, by method; multiply-adds as one.
        accuracy: share of the pictures named rightly, by method; of random a share a seed.
        speed_up: over the dense baseline, of the methods that were timed.
    """

    keep: float
    tokens: tuple[int, ...]
    gflops: Mapping[str, float]
    accuracy: Mapping[str, tuple[float, ...]]
    speed_up: Mapping[str, Spread]

    def mean(self, method: str) -> float:
        """Accuracy of a method, over its seeds."""
        return statistics.fmean(self.accuracy[method])


@dataclass(frozen=True)
class Demo:
    """The demo's table.

    Args:
        pictures: how many.
        blocks: after which tokens leave.
        accuracy: of the dense model, a share.
        tokens, gflops: of the dense model, one picture.
        baseline: what speed-ups are relative to.
        seconds: of the baseline, for a batch.
        batch, threads, rounds: how speed was measured.
    """

    pictures: int
    blocks: tuple[int, ...]
    accuracy: float
    tokens: int
    gflops: float
    baseline: str
    seconds: float
    batch: int
    threads: int
    rounds: int
    rows: tuple[Row, ...]

    @property
    def methods(self) -> list[str]:
        """In the order of the table."""
        return list(self.rows[0].accuracy)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The table: heads, and a row for the dense model and for each budget."""
        heads = ["keep", "tokens", "GFLOPs", "speed-up", *self.methods]
        dense = ["dense", str(self.tokens), f"{self.gflops:.3f}", "1", *[_percent(self.accuracy)] * len(self.methods)]
        rows = [
            [
                f"{row.keep}",
                " > ".join(map(str, row.tokens)),
                f"{row.gflops[OURS]:.3f}",
                str(row.speed_up[OURS]),
                *(_spread(row.accuracy[method]) for method in self.methods),
            ]
            for row in self.rows
        ]
        return heads, [dense, *rows]

    def title(self) -> str:
        """What the table shows."""
        after = ", ".join(map(str, self.blocks))
        return (
            f"{self.pictures} photographs with a digit somewhere; tokens leave after blocks {after} of a small ViT; "
            "accuracy in % by what chose them"
        )

    def notes(self) -> list[str]:
        """How it was measured, and what it shows."""
        speed = (
            f"speed-up and GFLOPs of shift; over {self.baseline}, {1e3 * self.seconds:.0f} ms for a batch of "
            f"{self.batch} on {self.threads} threads; median [quartiles] of {self.rounds} interleaved rounds"
        )
        others = [
            f"{method} at keep {row.keep} {spread}"
            for row in self.rows
            for method, spread in row.speed_up.items()
            if method != OURS
        ]
        return [speed, *([f"others: {', '.join(others)}"] if others else []), self.verdict()]

    def __str__(self) -> str:
        heads, rows = self.cells()
        align = ("left", "left", "right", "left", *["right"] * len(self.methods))
        table = tabulate(rows, heads, disable_numparse=True, colalign=align)
        return "\n".join([self.title(), table, *self.notes()])

    def verdict(self) -> str:
        """One sentence that says what the numbers do and do not show."""
        won = [
            f"{method} in {sum(row.mean(OURS) > row.mean(method) for row in self.rows)}"
            for method in self.methods
            if method != OURS
        ]
        error = 100 * (self.accuracy * (1 - self.accuracy) / self.pictures) ** 0.5
        seeds = len(self.rows[0].accuracy[RANDOM])
        return (
            f"of {len(self.rows)} budgets shift is more accurate than {', than '.join(won)} (random: mean [range] of "
            f"{seeds} seeds); a picture is {100 / self.pictures:.2f} points, the standard error of the dense accuracy "
            f"{error:.1f}: smaller differences say little"
        )

    def to_json(self) -> str:
        """The same content; shares from 0 to 1, speed-ups as median and quartiles."""
        content: dict[str, Any] = asdict(self)
        for given, row in zip(content["rows"], self.rows, strict=True):
            given["speed_up"] = {method: spread.to_dict() for method, spread in row.speed_up.items()}
        return json.dumps(content | {"verdict": self.verdict()}, indent=2)


def _spread(shares: tuple[float, ...]) -> str:
    if len(shares) == 1:
        return _percent(shares[0])
    return f"{_percent(statistics.fmean(shares))} [{_percent(min(shares))}, {_percent(max(shares))}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
