"""The demo that needs no download: what pruning costs and what it gains, on handwritten digits."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from passes.sites.importance import ClassAttention, Random, Score, Shift
from rs_compile.digits import load_digits, load_pretrained_digits_vit
from rs_compile.optimize import Backend, optimize
from rs_compile.report import Report
from rs_compile.schedule import Schedule
from rs_compile.timing import COMPILED, Call, Say, Spread, compiled, interleaved, quiet

BLOCKS = (0, 2, 4)
KEEP_RATIOS = (0.9, 0.8, 0.7, 0.5)
QUICK_KEEP_RATIOS = (0.7,)
SEEDS = 5
BATCH = 64
TURN = 0.1  # seconds; calls this short are noisy alone
ROUNDS, QUICK_ROUNDS = 15, 3


@dataclass(frozen=True)
class Row:
    """One schedule.

    Args:
        schedule: as `Schedule.parse` reads it.
        tokens: per sample, at the start and after each pruned block.
        macs: multiply-accumulates of one sample.
        shift, class_attention: share of the test images named rightly, by score.
        random: the same for random pruning, for each seed.
        speed_up: of shift pruning over the dense baseline.
    """

    schedule: str
    tokens: tuple[int, ...]
    macs: int
    shift: float
    class_attention: float
    random: tuple[float, ...]
    speed_up: Spread


@dataclass(frozen=True)
class Demo:
    """The demo's table: `str()` to read, `to_json()` to keep.

    Args:
        images: number of test images.
        accuracy: of the dense model, a share.
        tokens, macs: of the dense model, one sample.
        baseline: what speed-ups are relative to.
        batch, threads, rounds: how speed was measured.
    """

    images: int
    accuracy: float
    tokens: int
    macs: int
    baseline: str
    batch: int
    threads: int
    rounds: int
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        heads = ["keep after blocks", "tokens", "MMACs", "shift", "class attention", "random", "speed-up"]
        table = [["none pruned", str(self.tokens), _mega(self.macs), *[_percent(self.accuracy)] * 3, "1"]]
        for row in self.rows:
            least, most = _percent(min(row.random)), _percent(max(row.random))
            drawn = f"{_percent(statistics.fmean(row.random))} ({least} to {most})"
            table.append(
                [
                    row.schedule,
                    " > ".join(map(str, row.tokens)),
                    _mega(row.macs),
                    _percent(row.shift),
                    _percent(row.class_attention),
                    drawn,
                    str(row.speed_up),
                ]
            )
        text = tabulate(
            table,
            heads,
            disable_numparse=True,
            colalign=("left", "left", "right", "right", "right", "left", "left"),
        )
        return (
            f"Digits ViT, {self.tokens} tokens: accuracy in % on {self.images} test images, "
            "by what chose the tokens\n"
            f"{text}\n"
            f"speed-up: shift pruning over {self.baseline}, batch {self.batch}, {self.threads} threads, "
            f"median [quartiles] of {self.rounds} interleaved rounds\n"
            f"{self.verdict()}"
        )

    def verdict(self) -> str:
        """One sentence that says what the numbers do and do not show."""
        means = [statistics.fmean(row.random) for row in self.rows]
        over_random = sum(row.shift > mean for row, mean in zip(self.rows, means, strict=True))
        over_attention = sum(row.shift > row.class_attention for row in self.rows)
        error = 100 * (self.accuracy * (1 - self.accuracy) / self.images) ** 0.5
        total = len(self.rows)
        return (
            f"Shift pruning is more accurate than random pruning (mean of {SEEDS} seeds) in {over_random} of "
            f"{total} rows and than class attention in {over_attention} of {total}; one image is "
            f"{100 / self.images:.2f} points and the standard error of the dense accuracy {error:.1f}, "
            "so a smaller difference than that says little."
        )

    def to_json(self) -> str:
        """The same content; shares from 0 to 1, speed-ups as median and quartiles."""
        content: dict[str, Any] = asdict(self)
        for given, row in zip(content["rows"], self.rows, strict=True):
            given["speed_up"] = row.speed_up.to_dict()
            given["random_mean"] = statistics.fmean(row.random)
        return json.dumps(content | {"verdict": self.verdict()}, indent=2)


@torch.no_grad()
def run(backend: Backend = "inductor", quick: bool = False, say: Say = quiet) -> Demo:
    """Prunes the digits ViT by several schedules and scores, and times shift pruning.

    Args:
        backend: torch.compile's, for the timing; "eager" compiles nothing and compares with the plain model.
        quick: one schedule, few rounds.
        say: progress.

    Raises:
        ImportError: scikit-learn, which carries the digits, is missing.
    """
    images, labels = load_digits("test")
    model = load_pretrained_digits_vit()
    ratios, rounds = (QUICK_KEEP_RATIOS, QUICK_ROUNDS) if quick else (KEEP_RATIOS, ROUNDS)
    schedules = [dict.fromkeys(BLOCKS, ratio) for ratio in ratios]
    scores = [_accuracies(model, keep, images, labels, say) for keep in schedules]
    baseline = "the model, eager" if backend == "eager" else COMPILED
    speed_ups = _speed_ups(model, schedules, images[:BATCH], backend, rounds, baseline, say)
    rows = []
    for keep, (shift, attention, random, report), speed_up in zip(schedules, scores, speed_ups, strict=True):
        tokens = tuple(row.tokens_out or 0 for row in report.blocks if row.block in keep)
        start = report.blocks[0].tokens_in or 0
        name = ",".join(f"{block}:{ratio}" for block, ratio in keep.items())
        rows.append(Row(name, (start, *tokens), report.macs, shift, attention, random, speed_up))
    dense = scores[0][-1]
    return Demo(
        len(images),
        _accuracy(model, images, labels),
        rows[0].tokens[0],
        dense.macs_dense,
        baseline,
        BATCH,
        torch.get_num_threads(),
        rounds,
        tuple(rows),
    )


def _accuracies(
    model: nn.Module, keep: dict[int, float], images: Tensor, labels: Tensor, say: Say
) -> tuple[float, float, tuple[float, ...], Report]:
    """By score: shift, class attention, random for each seed; and the report of the first."""
    ratio = next(iter(keep.values()))

    def handle(score: Score) -> Any:
        return optimize(
            model,
            Schedule(keep, score=score),
            backend="eager",
            progress=lambda text: say(f"keep {ratio}, {score.kind}: {text}"),
        )

    shift = handle(Shift())
    by_shift = _accuracy(shift, images, labels)
    by_attention = _accuracy(handle(ClassAttention()), images, labels)
    random, drawn = handle(Random()), []
    with torch.random.fork_rng(devices=[]):
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            drawn.append(_accuracy(random, images, labels))
    return by_shift, by_attention, tuple(drawn), shift.report()


def _speed_ups(
    model: nn.Module,
    schedules: list[dict[int, float]],
    images: Tensor,
    backend: Backend,
    rounds: int,
    baseline: str,
    say: Say,
) -> list[Spread]:
    dense = compiled(model, backend)
    calls: dict[str, Call] = {baseline: lambda: dense(images)}
    for keep in schedules:
        handle = optimize(model, keep, backend=backend)
        calls[f"keep {next(iter(keep.values()))}"] = partial(handle, images)
    timing = interleaved(calls, rounds, least_seconds=TURN, say=say)
    return [timing.ratio(baseline, name) for name in calls if name != baseline]


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).double().mean())


def _mega(macs: int) -> str:
    return f"{macs / 1e6:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
