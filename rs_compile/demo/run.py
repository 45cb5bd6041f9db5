"""The demo that needs no download: what leaving tokens out costs and gains, by what chose them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from passes.sites.attention_scores import ClassAttention
from passes.sites.importance import Lowest, Random, Score, Shift
from passes.sites.mergers import Ward
from rs_compile.compiling import Backend
from rs_compile.demo.model import DEPTH, load_pretrained_demo_vit
from rs_compile.demo.pictures import demo_pictures
from rs_compile.demo.result import OURS, RANDOM, CompiledSpeed, Demo, Row
from rs_compile.optimize import OptimizedModel, optimize
from rs_compile.planning import Planner
from rs_compile.schedule import Schedule
from rs_compile.timing import COMPILED, EAGER, PRUNED, Call, Say, Timing, compiled, interleaved, quiet

TOKENS = 197  # of a picture
BLOCKS = (0, 2, 4)  # after which tokens leave
KEEP_RATIOS, QUICK_KEEP_RATIOS = (0.7, 0.5, 0.4, 0.3), (0.7,)
SEEDS = 5
PICTURES, QUICK_PICTURES = 400, 64
BATCH = 32
TURN = 0.1  # seconds; calls this short are noisy alone
ROUNDS, QUICK_ROUNDS = 7, 3
COMPILED_KEEP = 0.5  # one budget: compiling takes longer than all else here


def _by(score: Score) -> Callable[[float, int], Schedule]:
    return lambda ratio, tokens: pruned(ratio, score)


def pruned(ratio: float, score: Score | None = None) -> Schedule:
    """After each block of `BLOCKS` this share of the tokens stays."""
    return Schedule(dict.fromkeys(BLOCKS, ratio), score=score or Shift())


def merged(ratio: float, tokens: int) -> Schedule:
    """As many tokens leave in front of the next attention, merged into others, as `pruned` leaves out.

    One of two can, the class token never; more than that leave one block later.
    """
    counts, like, wanted = {}, pruned(ratio), tokens
    for block in range(DEPTH - 1):
        wanted = like.left(wanted, keep_ratio=ratio) if block in BLOCKS else wanted
        gone = min(tokens - wanted, (tokens - 1) // 2)
        if gone:
            counts[block + 1] = gone
            tokens -= gone
    return Schedule(merge=counts, by=Ward())


ATTENTION, MERGED = "class attention", "Ward merging"
TIMED = (OURS, ATTENTION, MERGED)
METHODS: Mapping[str, Callable[[float, int], Schedule]] = {
    OURS: _by(Shift()),
    ATTENTION: _by(ClassAttention()),
    MERGED: merged,
    RANDOM: _by(Random()),
    "lowest shift": _by(Lowest(Shift())),
}


@torch.no_grad()
def run(backend: Backend = "inductor", quick: bool = False, say: Say = quiet) -> Demo:
    """Prunes and merges tokens of the demo's ViT by every method at several budgets.

    Args:
        backend: torch.compile's, for the compiled model's speed at one budget; "eager" compiles nothing.
        quick: one budget, few pictures and rounds.
        say: progress.
    """
    inputs, labels = demo_pictures(QUICK_PICTURES if quick else PICTURES)
    model = load_pretrained_demo_vit()
    ratios, rounds = (QUICK_KEEP_RATIOS, QUICK_ROUNDS) if quick else (KEEP_RATIOS, ROUNDS)
    say("accuracy: dense")
    dense = _accuracy(model, inputs, labels)
    planner = Planner(inputs[:BATCH], verify=True)
    handles: dict[tuple[str, float], OptimizedModel] = {}
    shares: dict[tuple[str, float], tuple[float, ...]] = {}
    for ratio in ratios:
        for name, method in METHODS.items():
            say(f"accuracy: {name}, keep {ratio}")
            handle = optimize(model, method(ratio, TOKENS), backend="eager")
            planner.plan(handle)
            handles[name, ratio] = handle
            shares[name, ratio] = _accuracies(handle, inputs, labels, SEEDS if name == RANDOM else 1)
    batch = inputs[:BATCH]
    calls: dict[str, Call] = {EAGER: partial(model, batch)}
    calls |= {_called(*key): partial(handle, batch) for key, handle in handles.items() if key[0] in TIMED}
    timing = _interleaved(calls, rounds, say)
    rows = tuple(
        Row(
            ratio,
            tuple(b.tokens_out or 0 for b in handles[OURS, ratio].report().blocks if b.block in BLOCKS),
            {name: handles[name, ratio].report().flops / 1e9 for name in METHODS},
            {name: shares[name, ratio] for name in METHODS},
            {name: timing.ratio(EAGER, _called(name, ratio)) for name in TIMED},
        )
        for ratio in ratios
    )
    return Demo(
        len(labels),
        BLOCKS,
        dense,
        TOKENS,
        handles[OURS, ratios[0]].report().flops_dense / 1e9,
        timing.of(EAGER).median,
        BATCH,
        torch.get_num_threads(),
        rounds,
        rows,
        None if backend == "eager" else _compiled(model, batch, backend, rounds, say),
    )


def _compiled(model: nn.Module, batch: Tensor, backend: Backend, rounds: int, say: Say) -> CompiledSpeed:
    """Of shift pruning over the dense model, both compiled."""
    fast, dense = optimize(model, pruned(COMPILED_KEEP), backend=backend), compiled(model, backend)
    timing = _interleaved({COMPILED: partial(dense, batch), PRUNED: partial(fast, batch)}, rounds, say)
    return CompiledSpeed(COMPILED_KEEP, timing.of(COMPILED).median, timing.ratio(COMPILED, PRUNED))


def _interleaved(calls: dict[str, Call], rounds: int, say: Say) -> Timing:
    return interleaved(calls, rounds, least_seconds=TURN, say=lambda text: say(f"speed: {text}"))


def _called(name: str, ratio: float) -> str:
    return f"{name}, keep {ratio}"


def _accuracies(model: nn.Module, inputs: Tensor, labels: Tensor, seeds: int) -> tuple[float, ...]:
    found = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(seeds):
            torch.manual_seed(seed)
            found.append(_accuracy(model, inputs, labels))
    return tuple(found)


def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    named = torch.cat([model(part).argmax(1) for part in inputs.split(BATCH)])
    return float((named == labels).double().mean())
