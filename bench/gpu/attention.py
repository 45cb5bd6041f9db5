"""Which attention kernel really runs, by the profiler, beside the one that the report says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.gpu.document import Table
from bench.gpu.plan import Setting, Step
from bench.gpu.profiled import traced
from bench.gpu.rows import fill_row, forget
from bench.tables.methods import METHODS, OURS, SDPA, STREAM, Method, dense, merging, pruned
from bench.tables.results import Results, Row
from bench.throughput.networks import NETWORKS
from rs_compile import OptimizedModel, plan
from rs_compile.commands import DTYPES

KEEP, BATCHES = 0.8, {"UMT-B": 2}
BATCH, TINY_BATCH = 8, 2
FUSED = ("flash", "efficient", "cudnn", "fused")


@dataclass(frozen=True)
class Case:
    """A model of the sweep and a way to run it."""

    model: str
    way: Method


def cases(tiny: bool) -> list[Case]:
    """The three models, dense and pruned, and one that merges; tiny, one of them dense."""
    found = []
    for name in ("DeiT-S", "UMT-B", "BEiT-B"):
        network = NETWORKS[name]
        found.append(Case(name, pruned(OURS, dict.fromkeys(network.blocks, KEEP), network.attention)))
        if not tiny or name == "DeiT-S":
            found.append(Case(name, dense(SDPA)))
    shares = dict.fromkeys(NETWORKS["DeiT-S"].blocks, round(1 - KEEP, 9))
    return [*found, Case("DeiT-S", merging(STREAM, shares))]


def measure(step: Step, setting: Setting, results: Results) -> None:
    """A row for each case."""
    for case in cases(setting.tiny):
        identity = {"model": case.model, "method": case.way.name, "dtype": step.dtype}
        fill_row(results, identity, partial(seen, case, step.dtype, setting))
        forget()


def seen(case: Case, dtype: str, setting: Setting) -> Mapping[str, Any]:
    """The kernels that a call took, and those that the report announced."""
    network, device = NETWORKS[case.model], torch.device(setting.device)
    model = network.make(setting.tiny).to(device, DTYPES[dtype])
    batch = TINY_BATCH if setting.tiny else BATCHES.get(case.model, BATCH)
    inputs = network.inputs(batch, setting.tiny).to(device, DTYPES[dtype])
    forward = case.way.apply(model, setting.backend)
    call = partial(forward, inputs)
    call()
    dense: Any = forward
    report = forward.report() if isinstance(forward, OptimizedModel) else plan(dense, {}, inputs)
    trace = traced(call, device)
    return {
        "announced": dict(Counter(row.attention_kernel for row in report.blocks)),
        "reasons": sorted({row.kernel_reason for row in report.blocks if row.kernel_reason}),
        "seen": dict(Counter(trace.attentions)),
        "kernels": trace.attention_kernels,
    }


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table, with a verdict for each model that is not as announced."""
    lines, verdicts = [], []
    for row in rows:
        name = f"{row['model']}, {METHODS[row['method']]}"
        if row["failed"]:
            lines.append([name, f"failed: {row['failed']}", "", "", ""])
            continue
        # what is written out, or made of single ops, is no one kernel to see
        as_said = {kind: n for kind, n in row["announced"].items() if kind in FUSED} == row["seen"]
        kernels = ", ".join(kernel[:60] for kernel in row["kernels"][:3])
        reasons = "; ".join(row["reasons"])
        lines.append([name, _counts(row["announced"]), _counts(row["seen"]), kernels, reasons])
        if not as_said:
            verdicts.append(
                f"{name}: the report says {_counts(row['announced'])}, the profiler {_counts(row['seen']) or 'none'}"
            )
    if lines and not verdicts:
        verdicts.append(f"in all {len(lines)} cases attention ran on the kernels that the report announces")
    heads = ("model", "announced", "seen", "kernels of the device", "why not flash")
    return [Table("Attention kernels", heads, lines, verdicts)]


def _counts(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
