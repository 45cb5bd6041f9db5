"""ResNets with rows and columns pruned: table 6 at the paper's batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu.document import Table
from bench.gpu.plan import Setting, Step
from bench.gpu.rows import fill_row, fitting, forget
from bench.tables.measure import fill_gflops, identity
from bench.tables.methods import BASE
from bench.tables.options import Setting as TableSetting
from bench.tables.results import Results, Row
from bench.tables.table6 import METHODS, PAPER, fill_throughput, resnet
from rs_compile.commands import DTYPES

TINY_BATCH = 4


def measure(step: Step, setting: Setting, results: Results) -> None:
    """A row for each model: all ways are timed together, each in its faster memory format."""
    for name in step.subjects:
        fill_row(results, {"model": name, "dtype": step.dtype}, partial(compared, name, step.dtype, setting))
        forget()


def compared(name: str, dtype: str, setting: Setting) -> Mapping[str, Any]:
    """All ways in turns, at the paper's batch size or what of it fits."""
    of, methods = resnet(name, setting.tiny), list(METHODS.values())

    def timed(batch: int) -> dict[str, Row]:
        how = TableSetting(
            columns=["gflops", "throughput"],
            quick=setting.tiny,
            backend=setting.backend,
            device=torch.device(setting.device),
            dtype=DTYPES[dtype],
            batch_size=batch,
            rounds=setting.rounds,
            json=None,
            eager_everywhere=False,
        )
        found = Results(None, {})
        fill_throughput(found, of, methods, how)
        fill_gflops(found, of, methods)
        return {method.name: found.row(identity(of, method)) for method in methods}

    ways, batch = fitting(TINY_BATCH if setting.tiny else of.batch[1], timed)
    return {"ways": ways, "batch": batch, "batch_asked": of.batch[1]}


def tables(rows: Sequence[Row]) -> list[Table]:
    """Table 6 without its accuracy."""
    heads = ("model", "dtype", "batch", "way", "img/s", "memory format", "over compiled", "paper", "MAC ratio")
    lines, verdicts = [], []
    for row in rows:
        for name, way in row.get("ways", {}).items():
            low, high = way["speedup_quartiles"]
            printed = PAPER[row["model"]]
            paper = printed[name]["throughput"] / printed[BASE]["throughput"]
            ratio = row["ways"][BASE]["gflops"] / way["gflops"]
            speed_up = f"{way['speedup']:.2f}x [{low:.2f}, {high:.2f}]"
            same = [row["model"], row["dtype"], str(row["batch"]), "base, torch.compile" if name == BASE else name]
            speed = [f"{way['throughput']:.4g}", way["memory_format"], speed_up]
            lines.append([*same, *speed, "" if name == BASE else f"{paper:.2f}x", f"{ratio:.2f}"])
            if name != BASE:
                verdicts.append(f"{row['model']}, {row['dtype']}, {name}: {speed_up}; the paper has {paper:.2f}x")
        if row["failed"]:
            lines.append([row["model"], row["dtype"], "", f"failed: {row['failed']}", *[""] * 5])
    return [Table("ResNets", heads, lines, verdicts, ["Each way in the memory format that is faster for it."])]
