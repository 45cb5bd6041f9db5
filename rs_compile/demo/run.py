"""The demo that needs no download: what leaving tokens out costs and gains, by what chose them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from passes.sites.importance import ClassAttention, Lowest, Random, Score, Shift
from passes.sites.mergers import Ward
from rs_compile.demo.model import load_pretrained_demo_vit
from rs_compile.demo.pictures import demo_pictures
from rs_compile.demo.result import OURS, RANDOM, Demo, Row
from rs_compile.optimize import Backend, optimize
from rs_compile.planning import Planner
from rs_compile.report import Report
from rs_compile.schedule import Schedule
from rs_compile.timing import COMPILED, EAGER, Call, Say, Timing, compiled, interleaved, quiet

TOKENS = 197  # of a picture
BLOCKS = (0, 2, 4)  # after which tokens leave
KEEP_RATIOS, QUICK_KEEP_RATIOS = (0.9, 0.8, 0.7, 0.5), (0.7,)
SEEDS = 5
PICTURES, QUICK_PICTURES = 400, 100
BATCH = 64
TURN = 0.1  # seconds; calls this short are noisy alone
ROUNDS, QUICK_ROUNDS = 9, 3


def _by(score: Score) -> Callable[[float, int], Schedule]:
    return lambda ratio, tokens: pruned(ratio, score)


def pruned(ratio: float, score: Score | None = None) -> Schedule:
    """After each block of `BLOCKS` this share of the tokens stays."""
    return Schedule(dict.fromkeys(BLOCKS, ratio), score=score or Shift())


def merged(ratio: float, tokens: int) -> Schedule:
    """As many tokens leave in front of the next attention, merged into others, as `pruned` leaves out."""
    counts, like = {}, pruned(ratio)
    for block in BLOCKS:
        left = like.left(tokens, keep_ratio=ratio)
        counts[block + 1] = tokens - left
        tokens = left
    return Schedule(merge=counts, by=Ward())


METHODS: Mapping[str, Callable[[float, int], Schedule]] = {
    OURS: _by(Shift()),
    "class attention": _by(ClassAttention()),
    "Ward merging": merged,
    RANDOM: _by(Random()),
    "lowest shift": _by(Lowest(Shift())),
}


@torch.no_grad()
def run(backend: Backend = "inductor", quick: bool = False, say: Say = quiet) -> Demo:
    """Prunes and merges tokens of the demo's ViT by every method at several budgets, and times shift pruning.

    Args:
        backend: torch.compile's, for the timing; "eager" compiles nothing and compares with the plain model.
        quick: one budget, few pictures and rounds.
        say: progress.
    """
    inputs, labels = demo_pictures(QUICK_PICTURES if quick else PICTURES)
    model = load_pretrained_demo_vit()
    ratios, rounds = (QUICK_KEEP_RATIOS, QUICK_ROUNDS) if quick else (KEEP_RATIOS, ROUNDS)
    say("accuracy: dense")
    dense = _accuracy(model, inputs, labels)
    planner = Planner(inputs[:BATCH], verify=True)
    found = [
        {name: _measured(model, planner, name, ratio, inputs, labels, say) for name in METHODS} for ratio in ratios
    ]
    baseline = EAGER if backend == "eager" else COMPILED
    timing = _timed(model, ratios, inputs[:BATCH], backend, rounds, baseline, say)
    rows = []
    for ratio, by_method in zip(ratios, found, strict=True):
        report = by_method[OURS][1]
        kept = tuple(row.tokens_out or 0 for row in report.blocks if row.block in BLOCKS)
        rows.append(
            Row(
                ratio,
                (report.blocks[0].tokens_in or 0, *kept),
                {name: of.flops / 1e9 for name, (_, of) in by_method.items()},
                {name: shares for name, (shares, _) in by_method.items()},
                {OURS: timing.ratio(baseline, _called(ratio))},
            )
        )
    return Demo(
        len(labels),
        BLOCKS,
        dense,
        rows[0].tokens[0],
        report.flops_dense / 1e9,
        baseline,
        timing.of(baseline).median,
        BATCH,
        torch.get_num_threads(),
        rounds,
        tuple(rows),
    )


def _measured(
    model: nn.Module, planner: Planner, name: str, ratio: float, inputs: Tensor, labels: Tensor, say: Say
) -> tuple[tuple[float, ...], Report]:
    """Accuracy of a method at a budget, for each seed where there is chance in it, and what it costs."""
    say(f"accuracy: {name}, keep {ratio}")
    handle = optimize(model, METHODS[name](ratio, TOKENS), backend="eager")
    report, shares = planner.plan(handle), []
    with torch.random.fork_rng(devices=[]):
        for seed in range(SEEDS if name == RANDOM else 1):
            torch.manual_seed(seed)
            shares.append(_accuracy(handle, inputs, labels))
    return tuple(shares), report


def _timed(
    model: nn.Module,
    ratios: tuple[float, ...],
    inputs: Tensor,
    backend: Backend,
    rounds: int,
    baseline: str,
    say: Say,
) -> Timing:
    dense = compiled(model, backend)
    calls: dict[str, Call] = {baseline: lambda: dense(inputs)}
    for ratio in ratios:
        calls[_called(ratio)] = partial(optimize(model, pruned(ratio), backend=backend), inputs)
    return interleaved(calls, rounds, least_seconds=TURN, say=lambda text: say(f"speed: {text}"))


def _called(ratio: float) -> str:
    return f"shift, keep {ratio}"


def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    named = torch.cat([model(part).argmax(1) for part in inputs.split(BATCH)])
    return float((named == labels).double().mean())
