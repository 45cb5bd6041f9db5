"""Interleaved timing: A B A B, so that a machine that slows down slows both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

Call = Callable[[], object]
Say = Callable[[str], None]

COMPILED, PRUNED, EAGER = "torch.compile(model)", "rs_compile", "model, eager"


def quiet(text: str) -> None:
    """Progress that nobody reads."""


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles, over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: tuple[float, ...]) -> Spread:
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "quartile_low": self.low, "quartile_high": self.high}


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, by name and round; rounds stand at the same place in each tuple."""

    seconds: Mapping[str, tuple[float, ...]]

    def of(self, name: str) -> Spread:
        """Seconds of a call: median and quartiles over rounds."""
        return Spread.of(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> Spread:
        """How many times faster `fast` is: median and quartiles of the ratio within each round, in which
        both ran side by side, so that a slow minute of the machine cancels."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return Spread.of(tuple(s / f for s, f in pairs))


def interleaved(
    calls: Mapping[str, Call],
    rounds: int,
    *,
    least_seconds: float = 0.02,
    device: torch.device | str = "cpu",
    say: Say = quiet,
    enough: Callable[[Timing], bool] = lambda _: True,
) -> Timing:
    """Times each call once a round, in the order given, after warm-up calls that do not count.

    Args:
        calls: by name; the first call of each may compile.
        rounds: at least 1.
        least_seconds: a shorter call is repeated within its turn until the turn takes this long.
        device: a CUDA device is waited for before the clock is read.
        say: told which call is warmed up and which round runs.
        enough: asked after as many rounds, and after as many again, whether these will do.

    Raises:
        ValueError: no calls, or no rounds.
    """
    if not calls or rounds < 1:
        raise ValueError(f"{len(calls)} calls and {rounds} rounds; give at least one of each")
    wait = wait_for(torch.device(device))
    repeats = {}
    for name, call in calls.items():
        say(f"{name}: first call")
        call()
        once = min(_seconds(call, 1, wait) for _ in range(2))
        repeats[name] = max(1, math.ceil(least_seconds / max(once, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    while True:
        for i in range(rounds):
            say(f"round {i + 1} of {rounds}")
            for name, call in calls.items():
                seconds[name].append(_seconds(call, repeats[name], wait))
        timing = Timing({name: tuple(values) for name, values in seconds.items()})
        if enough(timing):
            return timing


def _seconds(call: Call, repeats: int, wait: Callable[[], None]) -> float:
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - started) / repeats


def wait_for(device: torch.device) -> Callable[[], None]:
    """A function that returns once a CUDA device has done what it was given; nothing to wait for elsewhere."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def compiled(model: nn.Module, backend: str | Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    """torch.compile(model): what pruning has to beat. With "eager" the model itself, like with like."""
    return model if backend == "eager" else torch.compile(model, backend=backend, dynamic=dynamic)
