"""An optimized model beside torch.compile(model) and the plain one, timed in turns."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from rs_compile.compiling import Backend
from rs_compile.guard import Side, faster
from rs_compile.optimize import OptimizedModel, optimize
from rs_compile.schedule import Schedule
from rs_compile.timing import COMPILED, EAGER, PRUNED, Call, Say, Timing, compiled, interleaved, quiet


@dataclass(frozen=True)
class Comparison:
    """An optimized model beside its baselines, on one input.

    Args:
        timing: of the calls.
        baseline: the name that speed-ups are relative to.
        batch: samples of one call.
        optimized: the handle, called at least once; its report is part of the result.
        settings: what was measured, and where.
    """

    timing: Timing
    baseline: str
    batch: int
    optimized: OptimizedModel
    settings: Mapping[str, Any]

    @property
    def kept(self) -> Side:
        """Which side `guard="measure"` keeps on these times; its dense side is the captured graph, which differs
        from torch.compile(model) where the model writes attention by hand."""
        return faster(self.timing, self.baseline, PRUNED) or "pruned"

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-ready values, with the seconds of every round."""
        report = self.optimized.report()
        return {
            "settings": dict(self.settings),
            "baseline": self.baseline,
            "batch": self.batch,
            "seconds": {name: list(values) for name, values in self.timing.seconds.items()},
            "median_seconds": {name: self.timing.of(name).median for name in self.timing.seconds},
            "speed_up": {name: self.timing.ratio(self.baseline, name).to_dict() for name in self.timing.seconds},
            "guard_keeps": self.kept,
            "macs_ratio": report.macs_dense / report.macs if report.macs else None,
        }


@dataclass(frozen=True)
class Sweep:
    """Comparisons of one model and schedule at several batch sizes, one at least."""

    results: tuple[Comparison, ...]
    model: str = ""  # what to call it, its class if not given

    def __str__(self) -> str:
        first = self.results[0]
        rows = []
        for result in self.results:
            medians = {name: result.timing.of(name).median for name in result.timing.seconds}
            speed_up = result.timing.ratio(result.baseline, PRUNED)
            each = f"{result.batch / medians[PRUNED]:.1f}"
            rows.append([result.batch, *(f"{1e3 * s:.2f}" for s in medians.values()), each, speed_up, result.kept])
        names = [f"{name}, ms" for name in first.timing.seconds]
        heads = ["batch", *names, f"{PRUNED}, samples/s", f"speed-up over {first.baseline}", "guard keeps"]
        align = ("right",) * (len(names) + 2) + ("left", "left")
        table = tabulate(rows, heads, disable_numparse=True, colalign=align)
        setting = ", ".join(f"{key} {value}" for key, value in first.settings.items())
        note = f"medians of interleaved rounds, ratios with their quartiles; {setting}"
        return f"{first.optimized.report()}\n\n{table}\n{note}"

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-ready values: the report, and under "batches" every comparison with all its rounds."""
        report = json.loads(self.results[0].optimized.report().to_json())
        return {"report": report, "batches": [result.to_dict() for result in self.results]}

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the same as a page, one file that needs nothing else.

        Raises:
            CompileError: the file cannot be written.
        """
        from rs_compile.pages import write_page

        write_page(path, "bench.html", sweep=self)


@torch.no_grad()
def compare(
    model: nn.Module,
    schedule: Schedule,
    inputs: Tensor,
    *,
    rounds: int,
    backend: Backend = "inductor",
    eager: bool = True,
    say: Say = quiet,
) -> Comparison:
    """torch.compile(model), the optimized model and (where `eager`) the plain one, interleaved.

    Args:
        model: in eval mode, on the device and in the dtype of `inputs`.
        schedule: what to prune.
        inputs: [B, ...], the model's only input.
        rounds: at least 1.
        backend: torch.compile's, for both; with "eager" nothing is compiled and the baseline is the model.
        eager: whether to time the uncompiled model as well.
        say: progress.

    Raises:
        CompileError: the model cannot be captured or pruned.
    """
    optimized = optimize(model, schedule, backend=backend, progress=lambda text: say(f"{PRUNED}: {text}"))
    dense = compiled(model, backend, dynamic=False)
    baseline = EAGER if backend == "eager" else COMPILED
    # the optimized model first: what it refuses should not wait for another compile
    say(f"{PRUNED}: first call")
    optimized(inputs)
    calls: dict[str, Call] = {baseline: lambda: dense(inputs), PRUNED: lambda: optimized(inputs)}
    if eager:
        calls.setdefault(EAGER, lambda: model(inputs))
    timing = interleaved(calls, rounds, device=inputs.device, say=say)
    settings = {
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "device": str(inputs.device),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }
    return Comparison(timing, baseline, inputs.shape[0], optimized, settings)
