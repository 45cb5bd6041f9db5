"""What is measured in time: finalists compiled, in turns with torch.compile(model)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rs_compile.compiling import Backend
from rs_compile.optimize import optimize
from rs_compile.schedule import Schedule
from rs_compile.search.evaluation import Evaluator
from rs_compile.search.pictures import Pictures
from rs_compile.search.progress import Bar
from rs_compile.timing import COMPILED, PRUNED, Call, Spread, Timing, compiled, interleaved

ROUNDS = 7
_STEADY, _MOST = 0.06, 4  # quartiles so near, of the median, or so many times as many rounds
_TURN = 0.1  # seconds; calls this short are noisy alone


@dataclass
class Stopwatch:
    """Compiles schedules and times each beside the compiled dense model, on one batch.

    Args:
        pictures: the batch.
        backend: torch.compile's, for both sides; "eager" compiles neither.
    """

    evaluator: Evaluator
    model: nn.Module
    pictures: Pictures
    backend: Backend
    bar: Bar
    _dense: Call | None = field(default=None)

    def speedup(self, schedule: Schedule) -> Spread:
        """How many times faster than the dense model: median and quartiles over rounds."""
        found = self.known(schedule)
        if found is None:
            self.bar.say("compiling and timing a finalist beside torch.compile(model)")
            self.evaluator.journal.add(self._key(schedule), self._time(schedule))
            self.bar.step()
            found = self.known(schedule)
            assert found is not None
        return found

    def known(self, schedule: Schedule) -> Spread | None:
        """The same where it was timed, else None."""
        key, journal = self._key(schedule), self.evaluator.journal
        if key not in journal:
            return None
        timing = Timing({name: tuple(values) for name, values in journal[key].items()})
        return timing.ratio(COMPILED, PRUNED)

    def _key(self, schedule: Schedule) -> str:
        return f"seconds {self.backend} {schedule.to_json()}"

    @torch.no_grad()
    def _time(self, schedule: Schedule) -> dict[str, list[float]]:
        args, kwargs = self.pictures.args, self.pictures.kwargs
        options: dict[str, Any] = dict(self.evaluator.options)
        handle = optimize(self.model, schedule, backend=self.backend, **options)
        if self._dense is None:
            dense = compiled(self.model, self.backend, dynamic=False)
            self._dense = lambda: dense(*args, **kwargs)
        calls: dict[str, Call] = {COMPILED: self._dense, PRUNED: lambda: handle(*args, **kwargs)}
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return steady(calls, device)


def steady(calls: dict[str, Call], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each round; more rounds where they differ, as beside other work."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_MOST):
        timing = interleaved(calls, ROUNDS, least_seconds=_TURN, device=device)
        for name, values in timing.seconds.items():
            seconds[name] += values
        spread = Timing({name: tuple(values) for name, values in seconds.items()}).ratio(COMPILED, PRUNED)
        if spread.high - spread.low <= _STEADY * spread.median:
            break
    return seconds
