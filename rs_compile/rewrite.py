"""A schedule in the passes' terms: the steps of the token pipeline, or the cuts of the grid's."""

from __future__ import annotations

from functools import partial

from torch.fx import GraphModule

from passes.grid_pipeline import cut_stages
from passes.pipeline import prune
from passes.sites.outcome import Compiled
from passes.sites.steps import Behind, Merge, Prune
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
        return cut_stages(gm, schedule.grid, schedule.score, compact, force)
    behind = Behind(explicit, schedule.gap, drop_unread)
    return prune(gm, _steps(schedule, force), compact, behind)


def unpruned(gm: GraphModule, schedule: Schedule, explicit: bool) -> Compiled:
    """The same of a prepared graph that nothing leaves: what `schedule` is measured against."""
    return cut_stages(gm, {}) if schedule.grid else prune(gm, (), behind=Behind(explicit=explicit))


def merging_text(schedule: Schedule, size_bias: str) -> str:
    """A line for the report on how tokens merged, "" where none did.

    Args:
        size_bias: how it reached attention, `Compiled.size_bias`.
    """
    if not any(schedule.merge.values()):
        return ""
    bias = f"size bias in attention as a {size_bias}" if size_bias else "no size bias in attention"
    mean = "weighted by size" if schedule.by.weighted_mean else "unweighted"
    copied = ", restored as copies of their destinations" if schedule.by.restore == "copy" else ""
    return f"merging: {schedule.by.kind}, {bias}, means over tokens {mean}{copied}"


def _steps(schedule: Schedule, force: bool) -> list[Prune | Merge]:
    # in a block merges come first: they can lie between attention and MLP
    return [
        *(
            Merge(block, partial(schedule.merged, r=r), schedule.by, schedule.protected)
            for block, r in schedule.merge.items()
        ),
        *(
            Prune(block, partial(schedule.left, keep_ratio=ratio), schedule.score, schedule.protected, force)
            for block, ratio in schedule.keep.items()
        ),
    ]
