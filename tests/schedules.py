"""What the oracles are told, as the compiler's own schedules."""

from __future__ import annotations

from typing import Any

from merge_oracle import Merging
from oracle import Pruning
from torch import nn

from passes.sites.attention_scores import SCORES
from passes.sites.mergers import MERGERS
from rs_compile import Lowest, Merger, OptimizedModel, Schedule, Score, Shift, VidTLDR
from rs_compile.compiling import Options


def handle_of(model: nn.Module, schedule: Schedule, **options: Any) -> OptimizedModel:
    """What `optimize` gives, uncompiled, with the switches that are for tests and for published baselines."""
    return OptimizedModel(model, Options(schedule, **{"backend": "eager", **options}))


def score_of(importance: str, operation: Any, metric: Any, with_skip: bool) -> Score:
    if importance == "shift":
        return Shift(operation, metric, with_skip)
    return SCORES[importance]()


def merger_of(kind: str, importance: Score | None = None, **options: Any) -> Merger:
    """Of vid-TLDR with the MLP's shift, where nothing else is said."""
    return VidTLDR(importance or Shift(), **options) if kind == "vid-tldr" else MERGERS[kind](**options)


def pruning_of(pruning: Pruning) -> Schedule:
    score = score_of("shift", pruning.operation, pruning.metric, pruning.with_skip)
    return Schedule(keep=dict(pruning.keep), score=Lowest(score) if pruning.lowest else score)


def merging_of(how: Merging) -> Schedule:
    score = score_of(how.importance, how.operation, how.metric, how.with_skip)
    options: dict[str, Any] = {"size_bias": how.size_bias, "weighted_mean": how.weighted_mean, "restore": how.restore}
    by = merger_of(how.merger, score, **options)
    pruned: dict[str, Any] = {"keep": dict(how.keep), "score": score} if how.keep else {}
    return Schedule(**pruned, protected=how.extra or None, merge=dict(how.merge), by=by)
