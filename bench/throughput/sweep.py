"""One cell of the sweep, a model at a batch size and a dtype: every way to run it, interleaved."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from bench.tables.methods import (
    ATTENTION,
    BASE,
    COMPILED,
    COMPILED_WRITTEN,
    DENSE,
    OURS,
    STREAM,
    Method,
    dense,
    merging,
    pruned,
)
from bench.tables.results import Results
from bench.throughput.networks import Network
from rs_compile import OptimizedModel, Report, plan
from rs_compile.commands import DTYPES
from rs_compile.timing import Call, Timing, interleaved

NAMES = (*DENSE, COMPILED_WRITTEN, ATTENTION, OURS, STREAM)
WRITTEN_OUT = {BASE, COMPILED_WRITTEN, ATTENTION}  # read or make the attention map
Say = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """What is timed side by side.

    Args:
        dtype: of the model and its floating inputs, by its name.
        methods: the first is what speed-ups are over.
    """

    network: Network
    batch: int
    dtype: str
    methods: Sequence[Method]

    def identity(self, method: Method) -> dict[str, Any]:
        """What tells a row from the others."""
        where = {"model": self.network.name, "batch": self.batch, "dtype": self.dtype}
        return {**where, "method": method.name, **method.at}

    def steps(self, rounds: int) -> int:
        """How often `measure` says something."""
        return len(self.methods) + rounds

    def done(self, results: Results) -> bool:
        """Whether every row has been measured, by an earlier run perhaps."""
        return not results.lacking([self.identity(m) for m in self.methods], "throughput")


def methods_of(
    network: Network, batch: int, names: Sequence[str], keeps: Sequence[float], multiples: Sequence[int]
) -> list[Method]:
    """The ways to run a model: torch.compile(model) first; tokens leave by the first of the ratios, ours by each.

    Args:
        multiples: of what stays, for ours at each ratio; 1 rounds nothing.
    """
    if network.written_out is not None and batch > network.written_out:
        names = [name for name in names if name not in WRITTEN_OUT]
    found = [dense(COMPILED), *(dense(name) for name in names if name in {*DENSE, COMPILED_WRITTEN} - {COMPILED})]
    first = dict.fromkeys(network.blocks, keeps[0])
    if ATTENTION in names:
        found.append(pruned(ATTENTION, first, network.attention, at={"keep": keeps[0]}))
    if OURS in names:
        for keep, multiple in product(keeps, multiples):
            at = {"keep": keep} | ({"multiple_of": multiple} if multiple > 1 else {})
            blocks = dict.fromkeys(network.blocks, keep)
            found.append(pruned(OURS, blocks, network.attention, at=at, multiple_of=multiple))
    if STREAM in names:
        shares = dict.fromkeys(network.blocks, round(1 - keeps[0], 9))
        found.append(merging(STREAM, shares, at={"keep": keeps[0]}))
    return found


@torch.no_grad()
def measure(
    cell: Cell, results: Results, *, backend: str, rounds: int, device: torch.device, quick: bool, say: Say
) -> None:
    """Times the cell's methods in turns and files their rows: samples a second, speed-up, MACs, share of the limit.

    Args:
        backend: torch.compile's; with "eager" nothing is compiled.
        quick: the small stand-in.
        say: told which method is called first and which round runs.
    """
    torch.compiler.reset()  # another batch size must not make this cell's shapes dynamic
    torch.manual_seed(0)
    dtype = DTYPES[cell.dtype]
    model = cell.network.make(quick).to(device, dtype)
    inputs = cell.network.inputs(cell.batch, quick).to(device)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    forwards = {m.label: m.apply(model, backend) for m in cell.methods}
    calls: dict[str, Call] = {label: partial(forward, inputs) for label, forward in forwards.items()}
    timing = interleaved(calls, rounds, device=device, say=say)
    reports = {label: f.report() for label, f in forwards.items() if isinstance(f, OptimizedModel)}
    whole = next(iter(reports.values()), None) or plan(model, {}, inputs)
    for method in cell.methods:
        of = figures(
            cell.batch, method.label, cell.methods[0].label, timing, reports.get(method.label), whole.macs_dense
        )
        results.fill(cell.identity(method), of)
    del forwards, calls, reports, model
    gc.collect()  # of cycles between compiled code and models, before the next cell takes its memory


def figures(
    batch: int, label: str, baseline: str, timing: Timing, report: Report | None, dense: int
) -> Mapping[str, Any]:
    """The columns of a row: MACs, samples a second, speed-up over the baseline, and that as a share of the MAC ratio.

    Args:
        label, baseline: names in `timing`.
        report: of a rewritten model, None for the model itself.
        dense: multiply-accumulates of the model itself.
    """
    spread = timing.ratio(baseline, label)
    ratio = 1.0 if report is None else dense / report.macs
    return {
        "macs": dense if report is None else report.macs,
        "macs_ratio": ratio,
        "throughput": batch / timing.of(label).median,
        "speedup": spread.median,
        "speedup_quartiles": [spread.low, spread.high],
        "of_limit": spread.median / ratio,
        "rounds_seconds": list(timing.seconds[label]),
    }
