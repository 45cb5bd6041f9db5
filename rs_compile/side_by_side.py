"""A handle beside its model on a user's own inputs: how far each output is from the dense one's, and both speeds."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.graph.base import CompileError
from passes.graph.codes import Code
from rs_compile.drift import apart, divergence, floats, logits_of, shown
from rs_compile.report import Report
from rs_compile.timing import COMPILED, EAGER, PRUNED, Call, Say, Timing, compiled, interleaved, quiet


@dataclass(frozen=True)
class OutputDrift:
    """How far an output is from the dense model's.

    Args:
        output: its name or place, "" of a model with one output.
        each: 1 - cosine over the channels, mean over positions, of each sample.
    """

    output: str
    each: tuple[float, ...]

    @property
    def drift(self) -> float:
        """Mean over the samples."""
        return fmean(self.each)

    @property
    def error(self) -> float:
        """Standard error of that mean; 0 of one sample."""
        return stdev(self.each) / len(self.each) ** 0.5 if len(self.each) > 1 else 0.0

    @property
    def worst(self) -> float:
        """Of any sample."""
        return max(self.each)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        means = {name: getattr(self, name) for name in ("drift", "error", "worst")}
        return {"output": self.output, **means, "each": list(self.each)}


@dataclass(frozen=True)
class SideBySide:
    """A handle beside its model.

    Args:
        outputs: a row an output.
        divergence: KL(dense || pruned) of the logits in nats, mean over samples; None where there are none.
        agreement: share of samples with the dense model's best class; None where there are no logits.
        samples: how many.
        timing: of both, interleaved.
        baseline: the dense side's name in it.
        report: what was rewritten.
    """

    outputs: tuple[OutputDrift, ...]
    divergence: float | None
    agreement: float | None
    samples: int
    timing: Timing
    baseline: str
    report: Report

    @property
    def macs_ratio(self) -> float:
        """Multiply-accumulates of the dense model over those left."""
        return self.report.macs_dense / self.report.macs

    def __str__(self) -> str:
        rows = [[row.output or "output", shown(row.drift, row.error), shown(row.worst)] for row in self.outputs]
        table = tabulate(rows, ["", "drift (1 - cosine)", "worst sample"], disable_numparse=True)
        medians = {name: self.timing.of(name).median for name in (self.baseline, PRUNED)}
        times = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in medians.items())
        faster = f"{self.timing.ratio(self.baseline, PRUNED)} faster"
        speed = f"{times}: {faster}, {self.macs_ratio:.2f}x fewer multiply-accumulates"
        logits = ""
        if self.divergence is not None and self.agreement is not None:
            logits = f"\nlogits: KL {shown(self.divergence)} nats, the same best class for {100 * self.agreement:.1f}%"
        return f"{table}{logits}\n{self.samples} samples; {speed}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the seconds of every round among them."""
        return {
            "outputs": [row.to_dict() for row in self.outputs],
            "divergence": self.divergence,
            "agreement": self.agreement,
            "samples": self.samples,
            "baseline": self.baseline,
            "seconds": {name: list(values) for name, values in self.timing.seconds.items()},
            "speed_up": self.timing.ratio(self.baseline, PRUNED).to_dict(),
            "macs_ratio": self.macs_ratio,
        }

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the same as a page with the report, one file that needs nothing else.

        Raises:
            CompileError: the file cannot be written.
        """
        from rs_compile.pages import write_page

        write_page(path, "compare.html", found=self)


@torch.no_grad()
def side_by_side(
    model: nn.Module,
    fast: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rounds: int,
    backend: Any,
    say: Say = quiet,
) -> SideBySide:
    """Runs both, compares their outputs, and times them in turns; see `OptimizedModel.compare`.

    Raises:
        CompileError: the model returns no tensor of floats to compare.
    """
    found, wanted = fast(*args, **kwargs), model(*args, **kwargs)
    of_dense, of_fast = floats(wanted), floats(found)
    rows = tuple(_row(place, of_fast[place], value) for place, value in of_dense.items() if place in of_fast)
    if not rows:
        raise CompileError(
            "the model returns no tensor of floats [B, ..., C] that both sides have; compare its outputs by hand",
            code=Code.OUTPUTS,
        )
    pick = logits_of(model, wanted)
    first = next(iter(of_dense.values()))
    dense = compiled(model, backend)
    baseline = EAGER if backend == "eager" else COMPILED
    calls: dict[str, Call] = {baseline: lambda: dense(*args, **kwargs), PRUNED: lambda: fast(*args, **kwargs)}
    return SideBySide(
        rows,
        None if pick is None else divergence(pick(found), pick(wanted)).mean().item(),
        None if pick is None else (pick(found).argmax(-1) == pick(wanted).argmax(-1)).double().mean().item(),
        len(first),
        interleaved(calls, rounds, device=first.device, say=say),
        baseline,
        fast.report(),
    )


def _row(place: Any, found: Tensor, wanted: Tensor) -> OutputDrift:
    return OutputDrift(pytree.keystr(place).strip("[]'."), tuple(apart(found, wanted).tolist()))
