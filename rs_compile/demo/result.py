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
Cells = tuple[list[str], list[list[str]]]  # heads and rows


@dataclass(frozen=True)
class Row:
    """One budget.

    Args:
        keep: the keep ratio after each block where tokens leave.
        tokens: of a picture, after each of these blocks.
        gflops: of a picture, by method; multiply-accumulates as one.
        accuracy: share of the pictures named rightly, by method; of random a share a seed.
        speed_up: over the dense model, both uncompiled, of the methods that were timed.
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
class CompiledSpeed:
    """Of shift pruning, compiled.

    Args:
        keep: the budget.
        seconds: of torch.compile(model), for a batch.
        speed_up: over it.
    """

    keep: float
    seconds: float
    speed_up: Spread


@dataclass(frozen=True)
class Demo:
    """The demo's table.

    Args:
        pictures: how many.
        blocks: after which tokens leave.
        accuracy: of the dense model, a share.
        tokens, gflops: of the dense model, one picture.
        seconds: of the dense model, uncompiled, for a batch.
        batch, threads, rounds: how speed was measured.
        compiled: the speed of one budget, compiled; None where nothing was.
    """

    pictures: int
    blocks: tuple[int, ...]
    accuracy: float
    tokens: int
    gflops: float
    seconds: float
    batch: int
    threads: int
    rounds: int
    rows: tuple[Row, ...]
    compiled: CompiledSpeed | None = None

    @property
    def methods(self) -> list[str]:
        """In the order of the table."""
        return list(self.rows[0].accuracy)

    def accuracies(self) -> Cells:
        """A row for the dense model and for each budget, by what chose the tokens."""
        heads = ["keep", "tokens", "GFLOPs", *self.methods]
        dense = ["dense", str(self.tokens), f"{self.gflops:.3f}", *[_percent(self.accuracy)] * len(self.methods)]
        rows = [
            [
                f"{row.keep}",
                " > ".join(map(str, (self.tokens, *row.tokens))),
                f"{row.gflops[OURS]:.3f}",
                *(_spread(row.accuracy[method]) for method in self.methods),
            ]
            for row in self.rows
        ]
        return heads, [dense, *rows]

    def speeds(self) -> Cells:
        """A row for each budget, by method."""
        timed = list(self.rows[0].speed_up)
        return ["keep", *timed], [[f"{row.keep}", *(str(row.speed_up[name]) for name in timed)] for row in self.rows]

    def tables(self) -> tuple[tuple[str, Cells], ...]:
        """Both, with what they show."""
        after = ", ".join(map(str, self.blocks))
        return (
            (
                f"accuracy in % on {self.pictures} photographs with a digit somewhere, by what chose the tokens that "
                f"stay after blocks {after} of a small ViT",
                self.accuracies(),
            ),
            (
                f"speed-up over the dense model, both uncompiled: {1e3 * self.seconds:.0f} ms for a batch of "
                f"{self.batch} on {self.threads} threads; median [quartiles] of {self.rounds} interleaved rounds",
                self.speeds(),
            ),
        )

    def notes(self) -> list[str]:
        """The compiled model's speed, and what the numbers show."""
        if self.compiled is None:
            return [self.verdict()]
        c = self.compiled
        text = f"compiled: {OURS} at keep {c.keep} {c.speed_up} over torch.compile(model), {1e3 * c.seconds:.0f} ms"
        return [text, self.verdict()]

    def __str__(self) -> str:
        parts = []
        for title, (heads, rows) in self.tables():
            align = ["left", "left", *["right"] * (len(heads) - 2)]
            parts += [title, tabulate(rows, heads, disable_numparse=True, colalign=align), ""]
        return "\n".join([*parts, *self.notes()])

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
        if self.compiled is not None:
            content["compiled"]["speed_up"] = self.compiled.speed_up.to_dict()
        return json.dumps(content | {"verdict": self.verdict()}, indent=2)


def _spread(shares: tuple[float, ...]) -> str:
    if len(shares) == 1:
        return _percent(shares[0])
    return f"{_percent(statistics.fmean(shares))} [{_percent(min(shares))}, {_percent(max(shares))}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
