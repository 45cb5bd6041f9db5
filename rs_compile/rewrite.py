"""A schedule in the passes' terms: the steps of the token pipeline, or the cuts of the grid's."""

from __future__ import annotations

from functools import partial

from torch.fx import GraphModule

from passes.grid_pipeline import GridCut, cut_stages
from passes.pipeline import prune
from passes.sites.importance import Scoring
from passes.sites.outcome import Compiled
from passes.sites.steps import Behind, Merge, Prune
from rs_compile.errors import ScheduleError
from rs_compile.schedule import Schedule


def rewrite(
    gm: GraphModule, schedule: Schedule, compact: bool, force: bool, explicit: bool, drop_unread: bool
) -> Compiled:
    """Rewrites a prepared graph by a schedule.

    Args:
        compact: leave outputs that carry tokens short.
        force: insert selections even where nothing leaves.
        explicit: write out every attention.
        drop_unread: compute nothing for tokens that nobody reads.

    Raises:
        Refusal: a rewrite cannot be proven right.
        ScheduleError: the schedule asks for what this kind of model does not have.
    """
    if schedule.grid:
        return cut_stages(gm, _cuts(schedule, force), compact)
    behind = Behind(schedule.size_bias, schedule.weighted_mean, explicit, schedule.gap, drop_unread)
    return prune(gm, _steps(schedule, force), compact, behind)


def unpruned(gm: GraphModule, schedule: Schedule, explicit: bool) -> Compiled:
    """The same of a prepared graph that nothing leaves: what `schedule` is measured against."""
    return cut_stages(gm, ()) if schedule.grid else prune(gm, (), behind=Behind(explicit=explicit))


def merging_text(schedule: Schedule, size_bias: str) -> str:
    """A line for the report on how tokens merged, "" where none did.

    Args:
        size_bias: how it reached attention, `Compiled.size_bias`.
    """
    if not any(schedule.merge.values()):
        return ""
    bias = f"size bias in attention as a {size_bias}" if size_bias else "no size bias in attention"
    mean = "weighted by size" if schedule.weighted_mean else "unweighted"
    copied = ", restored as copies of their destinations" if schedule.restore == "copy" else ""
    return f"merging: {schedule.merger}, {bias}, means over tokens {mean}{copied}"


def _steps(schedule: Schedule, force: bool) -> list[Prune | Merge]:
    scoring = Scoring(schedule.operation, schedule.metric, schedule.with_skip, schedule.importance)
    # in a block merges come first: they can lie between attention and MLP
    return [
        *(
            Merge(block, partial(schedule.merged, r=r), schedule.merger, scoring, schedule.protected, schedule.restore)
            for block, r in schedule.merge.items()
        ),
        *(
            Prune(block, partial(schedule.left, keep_ratio=ratio), scoring, schedule.lowest, schedule.protected, force)
            for block, ratio in schedule.keep.items()
        ),
    ]


def _cuts(schedule: Schedule, force: bool) -> list[GridCut]:
    if schedule.importance not in ("shift", "random"):
        raise ScheduleError(
            f'importance={schedule.importance!r} reads attention, which no stage has; write "shift" or "random"'
        )
    if schedule.protected is not None:
        raise ScheduleError("protected names tokens, and a stage has rows and columns; leave it out")
    return [
        GridCut(
            stage,
            g.rows,
            g.columns,
            g.mode,
            g.order == "rows-first",
            g.against,
            schedule.metric,
            schedule.importance == "random",
            schedule.lowest,
            force,
        )
        for stage, g in schedule.grid.items()
    ]
