"""What first calls take, of the pruned and of the dense model, from cold and warm caches, as `compile-time` does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from bench.compile_time import cold_and_warm
from bench.gpu.document import Table
from bench.gpu.plan import Setting, Step
from bench.gpu.rows import fill_row
from bench.tables.results import Results, Row

DENSE, PRUNED = "dense", "pruned"


def measure(step: Step, setting: Setting, results: Results) -> None:
    """A row for each side, each in two processes of its own."""
    for side in (PRUNED, DENSE):
        fill_row(results, {"side": side}, partial(cold_and_warm, side, setting.tiny, setting.device))


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table, a verdict once both sides are there."""
    of = {row["side"]: row for row in rows if not row["failed"]}
    starts = ("cold", "warm")
    lines = [[side, *(f"{row[start]:.1f}" for start in starts)] for side, row in of.items()]
    lines += [[row["side"], f"failed: {row['failed']}", ""] for row in rows if row["failed"]]
    verdicts = []
    if {DENSE, PRUNED} <= of.keys():
        cold, warm = (of[PRUNED][start] / of[DENSE][start] for start in starts)
        verdicts.append(
            f"the first call takes {cold:.2f} times torch.compile(model)'s from cold caches, {warm:.2f} from warm"
        )
    notes = ["DeiT-S, batch 8, one call each; imports and the model are there before."]
    return [Table("First calls", ("DeiT-S", "cold, s", "warm, s"), lines, verdicts, notes)]
