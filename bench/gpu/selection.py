"""Finding the highest scores: two sorts, topk and a sort, or every two compared; which is fastest where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from bench.gpu.document import Table
from bench.gpu.plan import Setting, Step
from bench.gpu.rows import fill_row, forget, function, reason_of, say
from bench.gpu.verdict import winner
from bench.tables.results import Results, Row
from passes.sites.select import FEW, Way, keep_highest, way
from rs_compile.timing import interleaved

WAYS: tuple[Way, ...] = get_args(Way)
KEEP = 0.8
SLOW = "not tried: of so many rows Inductor sorts four in a warp, a program that ptxas needs many minutes for"


def shapes(tiny: bool) -> list[tuple[int, int]]:
    """(samples, tokens): DeiT and UMT at the paper's batch sizes, and to both sides of the borders."""
    return (
        [(2, 17), (2, 33)] if tiny else [(64, 197), (20, 2352), (512, 197), (64, 577), (256, 197), (512, 577), (1, 197)]
    )


def ways_for(samples: int, on_cuda: bool) -> list[Way]:
    """Those that can be compiled in time."""
    return [how for how in WAYS if not (on_cuda and how == "sorts" and samples > FEW)]


def measure(step: Step, setting: Setting, results: Results) -> None:
    """A row for each shape."""
    for samples, tokens in shapes(setting.tiny):
        fill_row(results, {"samples": samples, "tokens": tokens}, partial(compared, samples, tokens, setting))
        forget()


def chosen(how: Way, keep: int, scores: Tensor) -> Tensor:
    """The kept positions [B, keep] of scores [B, N] that mark one protected token, as a rewritten model finds them."""
    return keep_highest(scores, None, keep, how=how)


def compared(samples: int, tokens: int, setting: Setting) -> Mapping[str, Any]:
    """All ways in turns, each right; a way that cannot be compiled is noted and left out."""
    device = torch.device(setting.device)
    scores = torch.rand(samples, tokens, generator=torch.Generator().manual_seed(0))
    scores[:, 0] = torch.nan  # the class token
    keep = int(KEEP * tokens)
    wanted = chosen("topk", keep, scores).to(device)
    scores = scores.to(device)
    calls: dict[str, Callable[[], object]] = {}
    failed = {} if "sorts" in ways_for(samples, setting.on_cuda) else {"sorts": SLOW}
    for how in ways_for(samples, setting.on_cuda):
        run: Callable[[Tensor], Tensor] = function(partial(chosen, how, keep), setting)
        say(f"{how}: first call")
        try:
            found = run(scores)
        except Exception as error:
            failed[how] = reason_of(error)
            continue
        if not torch.equal(found, wanted):
            failed[how] = "chooses other tokens than topk does on the CPU"
            continue
        calls[how] = partial(run, scores)
    timing = interleaved(calls, setting.rounds, device=device)
    best = min(calls, key=lambda how: timing.of(how).median)
    ours = way(device, tokens, many=samples > FEW)
    return {
        "microseconds": {how: 1e6 * timing.of(how).median for how in calls},
        "best": best,
        "taken": ours,
        "ratio": timing.ratio(ours, best).to_dict() if ours in calls else None,
        "not_timed": failed,
    }


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table, and a verdict for each shape at which the compiler takes another way than the fastest."""
    lines, verdicts = [], []
    for row in rows:
        name = f"{row['samples']} x {row['tokens']}"
        if row["failed"]:
            lines.append([name, f"failed: {row['failed']}", *[""] * 4])
            continue
        times = [f"{row['microseconds'][how]:.1f}" if how in row["microseconds"] else "-" for how in WAYS]
        if row["ratio"] is None:
            words = f"the compiler's own way, {row['taken']}, was not timed: {row['not_timed'][row['taken']]}"
            verdicts.append(f"selecting, {name}: {words}")
        elif row["best"] != row["taken"] and winner(row["taken"], row["best"], row["ratio"]):
            words = (
                f"{row['best']} is {row['ratio']['median']:.2f}x as fast as {row['taken']}, which the compiler takes"
            )
            verdicts.append(f"selecting, {name} (samples x tokens): {words}")
        else:
            words = "as good as any"
        lines.append([name, *times, row["taken"], words])
    if lines and not verdicts:
        verdicts.append("selecting: the compiler takes the fastest way, or one as fast, at every size measured")
    heads = ("samples x tokens", *(f"{how}, us" for how in WAYS), "taken", "verdict")
    notes = list(dict.fromkeys(f"{how}: {why}." for row in rows for how, why in row.get("not_timed", {}).items()))
    return [Table("Selecting", heads, lines, verdicts, notes)]
