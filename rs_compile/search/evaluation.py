"""What a schedule costs and how far outputs drift with it: counted on the rewritten graph, run uncompiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from passes.graph.base import CompileError
from rs_compile.optimize import OptimizedModel, optimize
from rs_compile.planning import Planner
from rs_compile.report import Explanation, Report
from rs_compile.schedule import Schedule
from rs_compile.search.costs import Counted
from rs_compile.search.drift import Drift
from rs_compile.search.journal import Journal
from rs_compile.search.pictures import Pictures, SearchError

Half = Literal["search", "held"]
_KEPT = 2  # handles: what is counted is run next


@dataclass(frozen=True)
class Measured:
    """A number a picture, [B], of one half.

    Args:
        drift: see `Drift`.
        agreement: 1 where the best class is the dense model's; None where there are no classes.
    """

    drift: np.ndarray
    agreement: np.ndarray | None = None

    @property
    def mean(self) -> float:
        return float(self.drift.mean())

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return standard_error(self.drift)

    def below(self, other: Measured) -> bool:
        """Whether its drift is lower by more than the standard error of the difference, picture by picture."""
        apart = other.drift - self.drift
        return float(apart.mean()) > standard_error(apart)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values [B]."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("inf")


@dataclass
class Evaluator:
    """Counts and runs schedules of one model; what the journal has is not done again.

    Args:
        model: in eval mode.
        pictures: of both halves.
        batch: pictures a run.
        seed: of random selection.
        options: of `optimize`.
    """

    model: nn.Module
    pictures: Mapping[Half, Pictures]
    drift: Drift
    dense: Mapping[Half, list[Any]]
    journal: Journal
    batch: int
    seed: int
    options: Mapping[str, Any]
    _handles: dict[str, OptimizedModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sample = next(self.pictures["search"].batches(self.batch))
        self._planner = Planner(self._sample.args, self._sample.kwargs, verify=True)

    def first_look(self) -> tuple[Report, Explanation]:
        """The dense model captured and held against the model, and where tokens, rows and columns can leave it.

        Raises:
            CompileError: the model cannot be captured.
        """
        handle = self._handle(Schedule(), lower_attention=True)
        return self._planner.plan(handle), self._planner.explain(handle)

    def count(self, schedule: Schedule) -> Counted | None:
        """What the rewritten graph costs; None where it is refused, see `refusal`."""
        key = f"macs {schedule.to_json()}"
        if key not in self.journal:
            try:
                report = self._plan(schedule)
            except CompileError as error:
                self.journal.add(key, {"refused": str(error)})
            else:
                rows = [(b.tokens_in or 0, b.tokens_out or 0, b.macs) for b in report.blocks]
                self.journal.add(key, {"macs": report.macs, "rows": rows})
        found = self.journal[key]
        return None if "refused" in found else Counted(found["macs"], [tuple(row) for row in found["rows"]])

    def refusal(self, schedule: Schedule) -> str:
        """Why `count` gave nothing."""
        return str(self.journal[f"macs {schedule.to_json()}"]["refused"])

    def measure(self, schedule: Schedule, half: Half, draws: int = 1) -> Measured:
        """Drift on one half, the mean over so many draws of what chance decides."""
        key = f"{half} {schedule.to_json()}"
        if key not in self.journal:
            values = [self._run(self._planned(schedule), half, draw) for draw in range(draws)]
            drift = np.mean([drift for drift, _ in values], axis=0)
            agreements = [a for _, a in values if a is not None]
            agreement = np.mean(agreements, axis=0).tolist() if agreements else None
            self.journal.add(key, {"drift": drift.tolist(), "agreement": agreement})
        found = self.journal[key]
        agreement = found["agreement"]
        return Measured(np.array(found["drift"]), None if agreement is None else np.array(agreement))

    @torch.no_grad()
    def _run(self, handle: OptimizedModel, half: Half, draw: int) -> tuple[np.ndarray, np.ndarray | None]:
        drifts, agreements = [], []
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed + draw)
            for batch, dense in zip(self.pictures[half].batches(self.batch), self.dense[half], strict=True):
                outputs = handle(*batch.args, **batch.kwargs)
                drifts.append(checked(self.drift.of(outputs, dense, batch.index), len(batch)))
                agreements.append(self.drift.agreement(outputs, dense))
        same = [a.cpu() for a in agreements if a is not None]
        return torch.cat(drifts).numpy(), torch.cat(same).numpy() if same else None

    def _planned(self, schedule: Schedule) -> OptimizedModel:
        key = schedule.to_json()
        if key not in self._handles:
            self._plan(schedule)
        return self._handles[key]

    def _plan(self, schedule: Schedule) -> Report:
        handle = self._handle(schedule)
        report = self._planner.plan(handle)
        while len(self._handles) >= _KEPT:
            del self._handles[next(iter(self._handles))]
        self._handles[schedule.to_json()] = handle
        return report

    def _handle(self, schedule: Schedule, **more: Any) -> OptimizedModel:
        return optimize(self.model, schedule, backend="eager", **{**self.options, **more})


def checked(drift: Any, count: int) -> torch.Tensor:
    """A metric's values as float64 [B] on the CPU.

    Raises:
        SearchError: it is not one finite number a picture.
    """
    if not isinstance(drift, torch.Tensor) or drift.shape != (count,):
        shape = list(drift.shape) if isinstance(drift, torch.Tensor) else type(drift).__name__
        raise SearchError(f"the metric gave {shape} for {count} pictures; return a tensor [{count}], lower is better")
    values = drift.detach().double().cpu()
    if not bool(values.isfinite().all()):
        raise SearchError("the metric gave a number that is not finite; return finite ones, lower is better")
    return values
