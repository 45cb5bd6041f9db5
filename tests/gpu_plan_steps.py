"""A module of steps for the tests of the runner: each does what its subject says."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from bench.gpu.document import Table
from bench.gpu.plan import Setting, Step
from bench.gpu.rows import fill_row
from bench.tables.results import Results, Row


def measure(step: Step, setting: Setting, results: Results) -> None:
    """A first row, then what is asked for; where that went wrong, it goes well in a second run."""
    again = bool(results.rows)
    fill_row(results, {"row": "first"}, lambda: {"pid": os.getpid()})
    for subject in step.subjects if not again else ():
        if subject == "raises":
            raise ValueError("no such kernel\nand more")
        if subject == "waits":
            time.sleep(600)
        if subject == "dies":
            os.abort()
    fill_row(results, {"row": "last"}, lambda: {"pid": os.getpid()})


def tables(rows: Sequence[Row]) -> list[Table]:
    return [Table("Rows", ("row",), [[row["row"]] for row in rows], [f"{len(rows)} rows"])]
