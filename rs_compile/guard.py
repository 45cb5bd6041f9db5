"""Never slower: the dense and the pruned graph timed on the caller's own batch, and the faster one kept.

The dense side is the captured graph as it was before anything left it, compiled like the pruned one. Not
`torch.compile(model)`: that leaves its code on the model's classes, where a loser could not be dropped and each
size counts against Dynamo's recompile limit, and attention written by hand would lose for that alone.

On a busy machine a difference may be chance: rounds go on until it is none, for a while. Where it still may be, that is
no verdict, the pruned graph runs, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule

from passes.graph.aliasing import writes
from rs_compile.faithful import in_train_mode
from rs_compile.timing import Timing, interleaved

Guard = Literal["measure"]
Side = Literal["dense", "pruned"]
Run = Callable[..., Any]

ROUNDS, MOST_ROUNDS = 5, 30
CHANCE = 1 / 16  # that five rounds of equal sides all go to the same one
_PATIENCE = 20.0  # seconds after which no more rounds are begun
_TURN = 0.01  # seconds; a shorter call is repeated within its turn


@dataclass(frozen=True)
class Verdict:
    """What the guard kept, and why.

    Args:
        kept: which of the two graphs runs.
        sizes: the inputs' shapes that this holds for; none where nothing was timed.
        dense_seconds, pruned_seconds: medians of a call; None where nothing was timed.
        reason: why nothing was timed, "" where it was.
        rounds: how often both were timed.
        decided: whether the two differ by more than chance explains; where not, the pruned graph is kept.
    """

    kept: Side
    sizes: tuple[tuple[int, ...], ...] = ()
    dense_seconds: float | None = None
    pruned_seconds: float | None = None
    reason: str = ""
    rounds: int = 0
    decided: bool = False

    def __str__(self) -> str:
        if self.dense_seconds is None or self.pruned_seconds is None:
            return f"guard: nothing timed, the {self.kept} graph runs: {self.reason}"
        shapes = ", ".join(str(list(size)) for size in self.sizes)
        both = f"dense {1e3 * self.dense_seconds:.2f} ms, pruned {1e3 * self.pruned_seconds:.2f} ms"
        text = f"guard: {both} at {shapes}, medians of {self.rounds} interleaved rounds; "
        if self.decided:
            return f"{text}{self.kept} is kept"
        return (
            f"{text}the difference may be noise, so {self.kept} is kept undecided; on a quiet machine remeasure() "
            "has the next call time both again"
        )


def faster(timing: Timing, dense: str = "dense", pruned: str = "pruned") -> Side | None:
    """The side that is faster by more than chance explains, given the names of both; None where neither is.

    It has the lower median, and by a sign test won more of the rounds, in which both ran side by side, than equal
    sides would in one of sixteen cases.
    """
    medians = timing.of(dense).median, timing.of(pruned).median
    if medians[0] == medians[1]:
        return None
    first: Side = "dense" if medians[0] < medians[1] else "pruned"
    pairs = list(zip(timing.seconds[dense], timing.seconds[pruned], strict=True))
    won = sum(d < p if first == "dense" else p < d for d, p in pairs)
    as_many = sum(math.comb(len(pairs), k) for k in range(won, len(pairs) + 1))
    return first if 2 * as_many / 2 ** len(pairs) <= CHANCE else None


def measure(dense: Run, pruned: Run, leaves: Sequence[Any]) -> Verdict:
    """Times both on one batch, in turns, in the caller's own grad mode and autocast, until they differ or time is up.

    The state of the random number generators is put back, and nothing of the results is kept.

    Args:
        dense, pruned: compiled, called with `leaves`; their first call compiles.
        leaves: the flat inputs.
    """
    calls = {"dense": lambda: dense(*leaves), "pruned": lambda: pruned(*leaves)}
    gpus = _gpus(leaves)

    def enough(timing: Timing) -> bool:
        spent = sum(max(_TURN, once) for side in timing.seconds.values() for once in side)
        return faster(timing) is not None or _rounds(timing) + ROUNDS > MOST_ROUNDS or spent > _PATIENCE

    with torch.random.fork_rng(gpus):
        timing = interleaved(calls, ROUNDS, least_seconds=_TURN, device=gpus[0] if gpus else "cpu", enough=enough)
    sizes = tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor))
    seconds = timing.of("dense").median, timing.of("pruned").median
    found = faster(timing)
    return Verdict(found or "pruned", sizes, *seconds, rounds=_rounds(timing), decided=found is not None)


def _rounds(timing: Timing) -> int:
    return len(timing.seconds["dense"])


def _gpus(leaves: Sequence[Any]) -> list[torch.device]:
    return list({leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_cuda})


def hindrance(model: nn.Module, gm: GraphModule, prunes: bool) -> str:
    """Why a graph cannot be run several times for one call, or need not; "" where it can.

    Args:
        model: whose train mode counts.
        gm: the captured graph.
        prunes: whether anything leaves.
    """
    if not prunes:
        return "the schedule leaves nothing out"
    if training := in_train_mode(model, gm):
        return f"{training}; measured in eval mode only"
    written = next((n for node in gm.graph.nodes for n in writes(node)), None)
    return f"the model writes into {written.name}, and every run would do so again" if written is not None else ""


def all_kept(dense: Run, pruned: Run, leaves: Sequence[Any], kept: Sequence[int]) -> Run:
    """The dense run with the outputs of a compact one: for each token output the positions, all of them.

    Args:
        dense, pruned: see `measure`; the pruned one gives kept positions [B, K] behind its outputs.
        leaves: the flat inputs.
        kept: which outputs carry tokens.
    """
    with torch.random.fork_rng(_gpus(leaves)), torch.no_grad():
        full, short = dense(*leaves), pruned(*leaves)
    sequences = []
    for i, positions in zip(kept, short[len(full) :], strict=True):
        batch, left = positions.shape
        # the two outputs differ in the number of tokens only, wherever these stand in the shape
        sequences.append((i, batch, left * full[i].numel() // short[i].numel()))

    def with_positions(*leaves: Any) -> Any:
        outputs = dense(*leaves)
        places = (torch.arange(n, device=outputs[i].device).repeat(batch, 1) for i, batch, n in sequences)
        return (*outputs, *places)

    return with_positions
