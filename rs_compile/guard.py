"""Never slower: the dense and the pruned graph timed on the caller's own batch, and the faster one kept.

The dense side is the captured graph as it was before anything left it, compiled like the pruned one. Not
`torch.compile(model)`: that leaves its code on the model's classes, where a loser could not be dropped and each
size counts against Dynamo's recompile limit, and attention written by hand would lose for that alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule

from passes.graph.aliasing import writes
from rs_compile.timing import Timing, interleaved

Guard = Literal["measure"]
Side = Literal["dense", "pruned"]
Run = Callable[..., Any]

ROUNDS = 5
_TURN = 0.01  # seconds; a shorter call is repeated within its turn


@dataclass(frozen=True)
class Verdict:
    """What the guard kept, and why.

    Args:
        kept: which of the two graphs runs.
        sizes: the inputs' shapes that this holds for; none where nothing was timed.
        dense_seconds, pruned_seconds: medians of a call; None where nothing was timed.
        reason: why nothing was timed, "" where it was.
    """

    kept: Side
    sizes: tuple[tuple[int, ...], ...] = ()
    dense_seconds: float | None = None
    pruned_seconds: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.dense_seconds is None or self.pruned_seconds is None:
            return f"guard: nothing timed, the {self.kept} graph runs: {self.reason}"
        shapes = ", ".join(str(list(size)) for size in self.sizes)
        both = f"dense {1e3 * self.dense_seconds:.2f} ms, pruned {1e3 * self.pruned_seconds:.2f} ms"
        return f"guard: {both} at {shapes}, medians of {ROUNDS} interleaved rounds; {self.kept} is kept"


def faster(timing: Timing, dense: str = "dense", pruned: str = "pruned") -> Side:
    """The side with the lower median, given the names of both; pruned where they are equal."""
    return "dense" if timing.of(dense).median < timing.of(pruned).median else "pruned"


def measure(dense: Run, pruned: Run, leaves: Sequence[Any]) -> Verdict:
    """Times both on one batch, in turns, in the caller's own grad mode and autocast.

    The state of the random number generators is put back, and nothing of the results is kept.

    Args:
        dense, pruned: compiled, called with `leaves`; their first call compiles.
        leaves: the flat inputs.
    """
    calls = {"dense": lambda: dense(*leaves), "pruned": lambda: pruned(*leaves)}
    gpus = _gpus(leaves)
    with torch.random.fork_rng(gpus):
        timing = interleaved(calls, ROUNDS, least_seconds=_TURN, device=gpus[0] if gpus else "cpu")
    sizes = tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor))
    return Verdict(faster(timing), sizes, timing.of("dense").median, timing.of("pruned").median)


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
    if any(module.training for module in model.modules()):
        return "in train mode every run draws dropout and moves batch statistics; measured in eval mode only"
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
