"""How far long work is, on stderr: a bar with the time left on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_EVERY = 15.0  # seconds between lines


class Bar:
    """Counts steps of the work `name`; how many there will be is an estimate that is corrected on the way."""

    def __init__(self, progress: Progress | None, shown: bool, name: str) -> None:
        self._progress, self._shown, self._name = progress, shown, name
        self._task = progress.add_task("", total=None) if progress is not None else None
        self._done, self._total = 0, 0
        self._started, self._said = time.monotonic(), 0.0

    def expect(self, steps: int) -> None:
        """So many steps are still to come."""
        self._total = self._done + steps
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=self._total)

    def say(self, text: str) -> None:
        """What is going on."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text)
        elif self._shown and (now := time.monotonic()) - self._said > _EVERY:
            self._said = now
            print(f"{self._name}: {self._how_far(now)}{text}", file=sys.stderr, flush=True)

    def step(self) -> None:
        """One is done."""
        self._done += 1
        self._total = max(self._total, self._done)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._done, total=self._total)

    def _how_far(self, now: float) -> str:
        if not self._total:
            return ""
        left = (now - self._started) / max(1, self._done) * (self._total - self._done)
        return f"{self._done} of about {self._total}{f', {left / 60:.1f} min left' if self._done else ''}: "


@contextmanager
def bar(shown: bool, name: str = "search") -> Iterator[Bar]:
    """A bar, or lines where stderr is no terminal, or nothing."""
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield Bar(None, shown, name)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress, shown, name)
