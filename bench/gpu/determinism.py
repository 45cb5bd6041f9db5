"""Merging adds by `scatter_add`, on CUDA in no fixed order: how much results differ, and what a fixed order costs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.document import Table
from bench.gpu.plan import Setting, Step
from bench.gpu.rows import fill_row, forget, function, say
from bench.gpu.verdict import in_words
from bench.tables.results import Results, Row
from passes.sites.matching import cosine, match, merge
from rs_compile.commands import DTYPES
from rs_compile.timing import interleaved

FREE, FIXED = "in any order", "deterministic"
WIDTH, RUNS = 384, 20


def shapes(tiny: bool) -> list[tuple[int, int, int]]:
    """(samples, tokens, tokens that merge away): DeiT-S with ToMe's 13, and UMT-B's first merge of MSRVTT."""
    return [(2, 17, 4)] if tiny else [(64, 197, 13), (64, 197, 90), (8, 2352, 600)]


def measure(step: Step, setting: Setting, results: Results) -> None:
    """A row for each shape."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else products are refused when deterministic
    for samples, tokens, r in shapes(setting.tiny):
        identity = {"samples": samples, "tokens": tokens, "merged": r, "dtype": step.dtype}
        fill_row(results, identity, partial(compared, samples, tokens, r, step.dtype, setting))
        forget()


def merged(r: int, x: Tensor) -> Tensor:
    """[B, N, C] -> [B, N - r, C]: the r pairs that are most alike merge, one class token stays."""
    at = torch.arange(x.shape[1], device=x.device)
    matched = match(cosine(x), at < 1, r, 1, 0, "sequence")
    values, _ = merge([x], torch.ones(x.shape[:2], device=x.device), matched)
    return values[0]


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """torch.use_deterministic_algorithms, as it was afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def compared(samples: int, tokens: int, r: int, dtype: str, setting: Setting) -> Mapping[str, Any]:
    """Both in turns, and how many of the runs of each differ from its first."""
    device = torch.device(setting.device)
    # near one another, so that several sources take one destination
    x = torch.randn(samples, tokens, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.1
    x[..., 0] += 1
    x = x.to(device, DTYPES[dtype])
    calls = {name: _call(name == FIXED, partial(merged, r), x, setting) for name in (FREE, FIXED)}
    differ, furthest = {}, {}
    for name, call in calls.items():
        say(f"{name}: first call")
        first = call()
        others = [call() for _ in range(RUNS)]
        differ[name] = sum(not torch.equal(first, other) for other in others)
        furthest[name] = max(float((first - other).abs().max()) for other in others)
    timing = interleaved(calls, setting.rounds, device=device)
    return {
        "differ": differ,
        "furthest": furthest,
        "milliseconds": {name: 1e3 * timing.of(name).median for name in calls},
        "ratio": timing.ratio(FREE, FIXED).to_dict(),
    }


def _call(on: bool, run: Callable[[Tensor], Tensor], x: Tensor, setting: Setting) -> Callable[[], Tensor]:
    # of its own each: Inductor lowers scatter_add otherwise when deterministic
    made = function(run, setting)

    def call() -> Tensor:
        with deterministic(on):
            return made(x)

    return call


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table, a verdict for each shape."""
    lines, verdicts = [], []
    for row in rows:
        name = f"{row['samples']} x {row['tokens']}, {row['merged']} merge"
        if row["failed"]:
            lines.append([name, f"failed: {row['failed']}", *[""] * 4])
            continue
        took, words = row["milliseconds"], in_words(FREE, FIXED, row["ratio"])
        differ = f"{row['differ'][FREE]} of {RUNS}, by {row['furthest'][FREE]:.1e}"
        fixed = f"{row['differ'][FIXED]} of {RUNS}"
        lines.append([name, differ, fixed, f"{took[FREE]:.3f}", f"{took[FIXED]:.3f}", words])
        verdicts.append(
            f"scatter_add, {name}: runs that differ from the first: {row['differ'][FREE]} of {RUNS} in any order, "
            f"{fixed} when deterministic; {words}"
        )
    heads = ("merge", "runs that differ", "when deterministic", f"{FREE}, ms", f"{FIXED}, ms", "verdict")
    return [Table("Determinism of merging", heads, lines, verdicts, ["The whole merge is timed: matching and adding."])]
