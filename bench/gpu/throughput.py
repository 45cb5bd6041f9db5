"""One model at the paper's batch size and schedule: every way to run it beside eager attention and torch.compile.

A way at a time, so that a short session has the telling rows: each is timed in turns with both baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu.document import Table
from bench.gpu.plan import Setting, Step
from bench.gpu.rows import fill_row, fitting, forget, free, say
from bench.memory import peak_bytes
from bench.tables import table1, table2, table5
from bench.tables.methods import (
    ATTENTION,
    BASE,
    COMPILED,
    METHODS,
    OURS,
    SDPA,
    STREAM,
    TOME,
    VID_TLDR,
    VID_TLDR_SHIFT,
    WARD,
    Method,
    dense,
    merging,
    pruned,
)
from bench.tables.results import Results, Row
from bench.tables.subjects import DEIT, Paper, Subject, deit, umt_encoder
from bench.throughput.sweep import figures
from rs_compile import OptimizedModel, plan
from rs_compile.commands import DTYPES
from rs_compile.timing import Call, interleaved

DATASET = "MSRVTT"  # whose row of table 2 is shown; speed is the same in all
TINY_BATCH = 4
ORDER = (BASE, COMPILED, SDPA, OURS, ATTENTION, TOME, VID_TLDR_SHIFT, WARD, STREAM, VID_TLDR)  # of rows
Forwards = Mapping[str, Callable[..., Any]]  # by the name of the way
REHEARSED = (("DeiT-S", "float16"), ("UMT-B", "float16"))  # tiny with all ways; the others are the same code


def subject(name: str, tiny: bool) -> Subject:
    """DeiT as in table 5, UMT as in table 2."""
    if name in DEIT:
        return deit(name, table5.BLOCKS, table5.KEEP, table5.paper(name), tiny)
    printed = table2.paper(name, DATASET)
    return umt_encoder(name, table2.BLOCKS, table2.KEEP, printed, tiny, qa=False)


def ways(of: Subject) -> list[Method]:
    """How to run a model, the most telling first; merging takes as many tokens after the same blocks."""
    shares = {block: round(1 - ratio, 9) for block, ratio in of.keep.items()}
    return [
        pruned(OURS, of.keep, of.attention),
        dense(SDPA),
        pruned(ATTENTION, of.keep, of.attention),
        *(merging(name, shares) for name in (TOME, VID_TLDR_SHIFT, WARD, STREAM, VID_TLDR)),
    ]


def measure(step: Step, setting: Setting, results: Results) -> None:
    """A row for each model and way, and two for its baselines."""
    for name in step.subjects:
        _measure_one(subject(name, setting.tiny), step.dtype, setting, results)
        forget()


def _measure_one(of: Subject, dtype: str, setting: Setting, results: Results) -> None:
    batch = TINY_BATCH if setting.tiny else of.batch[1]
    model = of.make(False, None).to(setting.device, DTYPES[dtype])
    baselines: dict[int, Forwards] = {}  # compiled once for a batch size
    side = partial(_beside, of, model, setting, baselines)
    same = {"model": of.name, "dtype": dtype}
    rows: dict[str, Row] = {}
    few = setting.tiny and (of.name, dtype) not in REHEARSED
    for way in ways(of)[: 1 if few else None]:
        if not results.lacking([{**same, "method": way.name}], "throughput"):
            continue

        def make(way: Method = way) -> Mapping[str, Any]:
            nonlocal batch
            found, fits = fitting(batch, partial(side, way))
            batch = fits  # what did not fit once is not tried again
            rows.update(found)
            return {"batch": fits, "batch_asked": of.batch[1], **found[way.name]}

        fill_row(results, {**same, "method": way.name}, make)
        for name in (BASE, COMPILED):
            if name in rows and results.lacking([{**same, "method": name}], "throughput"):
                results.fill({**same, "method": name}, {"batch": batch, "failed": "", **rows[name]})
        free()


def _inputs(of: Subject, batch: int, model: torch.nn.Module) -> torch.Tensor:
    like = next(model.parameters())
    inputs = torch.randn(batch, *of.shape, generator=torch.Generator().manual_seed(0))
    return inputs.to(like.device, like.dtype)


def _beside(
    of: Subject,
    model: torch.nn.Module,
    setting: Setting,
    baselines: dict[int, Forwards],
    way: Method,
    batch: int,
) -> dict[str, dict[str, Any]]:
    """The rows of a way and of both baselines, timed in turns."""
    if batch not in baselines:
        torch.compiler.reset()  # another batch size must not make shapes dynamic
        baselines.clear()
        baselines[batch] = {name: dense(name).apply(model, setting.backend) for name in (BASE, COMPILED)}
    forwards = {**baselines[batch], way.name: way.apply(model, setting.backend)}
    inputs = _inputs(of, batch, model)
    calls: dict[str, Call] = {name: partial(forward, inputs) for name, forward in forwards.items()}
    timing = interleaved(calls, setting.rounds, device=setting.device, say=say)
    mine = forwards[way.name]
    whole = (mine.report() if isinstance(mine, OptimizedModel) else plan(model, {}, inputs)).macs_dense
    rows = {}
    for name, forward in forwards.items():
        report = forward.report() if isinstance(forward, OptimizedModel) else None
        over = timing.ratio(BASE, name)
        rows[name] = {
            **figures(batch, name, COMPILED, timing, report, whole),
            "over_eager": over.median,
            "over_eager_quartiles": [over.low, over.high],
            "peak_bytes": peak_bytes(calls[name], setting.device),
            **({"kernels": sorted({row.attention_kernel for row in report.blocks})} if report else {}),
        }
    return rows


def printed_speed_up(name: str, method: str) -> float | None:
    """The paper's speed-up over eager attention."""
    alone: dict[str, Paper] = {"DeiT-S": table1.DEIT_S, "UMT-B": table1.UMT_B}
    of = alone.get(name, {}) if method == SDPA else subject(name, False).paper
    if method == BASE or method not in of or BASE not in of:
        return None
    return of[method]["throughput"] / of[BASE]["throughput"]


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table for all models, and what the paper's headline numbers became."""
    rows = [row for row in rows if "method" in row]
    first = list(dict.fromkeys((row["model"], row["dtype"]) for row in rows))
    rows = sorted(rows, key=lambda r: (first.index((r["model"], r["dtype"])), ORDER.index(r["method"])))
    heads = ("model", "dtype", "batch", "way", "samples/s", "over eager", "paper", "over compiled", "MAC ratio")
    lines, verdicts, fewer = [], [], []
    for row in rows:
        if "throughput" not in row:
            lines.append(
                [row["model"], row["dtype"], "", METHODS[row["method"]], f"failed: {row['failed']}", *[""] * 6]
            )
            continue
        paper = printed_speed_up(row["model"], row["method"])
        spreads = [_spread(row, "over_eager"), _spread(row, "speedup")]
        lines.append(
            [
                row["model"],
                row["dtype"],
                str(row["batch"]),
                METHODS[row["method"]],
                f"{row['throughput']:.4g}",
                spreads[0],
                f"{paper:.2f}x" if paper else "",
                spreads[1],
                f"{row['macs_ratio']:.2f}",
                f"{row['of_limit']:.2f}" if row["macs_ratio"] > 1 else "",
                f"{row['peak_bytes'] / 2**20:.3g}",
            ]
        )
        if row["method"] == OURS:
            beside = f"; the paper has {paper:.2f}x" if paper else ""
            verdicts.append(
                f"{row['model']}, {row['dtype']}: ours is {spreads[0]} over eager attention{beside}; {spreads[1]} over "
                f"torch.compile with {row['macs_ratio']:.2f} times fewer multiply-accumulates"
            )
        if row["batch"] < row.get("batch_asked", 0):
            fewer.append(f"{row['model']}, {row['dtype']}: {row['batch']}, not {row['batch_asked']}")
    notes = ["Paper: over eager attention, tables 1, 2 and 5, on an RTX A6000. Of limit: over compiled / MAC ratio."]
    if fewer:
        text = "; ".join(dict.fromkeys(fewer))
        notes.append(f"Batches smaller than the paper's, for want of memory or in a rehearsal: {text}.")
    return [Table("Throughput", (*heads, "of limit", "peak MiB"), lines, verdicts, notes)]


def _spread(row: Row, column: str) -> str:
    low, high = row[f"{column}_quartiles"]
    return f"{row[column]:.2f}x [{low:.2f}, {high:.2f}]"
