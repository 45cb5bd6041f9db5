"""What the matcher finds in a model, with nothing changed or compiled."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import nn
from torch.fx import Node

from passes.axes.token_axis import sequences_per_sample
from passes.graph.base import PassResult, source_line
from passes.grid_pipeline import cuttable
from passes.network.branches import Block, module_path
from passes.network.prunable import prunable
from passes.network.stages import find_stages
from passes.pipeline import prepare
from passes.sites.outcome import block_kernels
from rs_compile.errors import named
from rs_compile.report import Explanation, ExplanationRow, StageExplanation, kernel_cells
from rs_compile.signature import check_inputs, constant_leaves, flatten


@named("explain")
def explain(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    constant_inputs: Collection[str] = (),
) -> Explanation:
    """What the matcher finds in a model, with nothing changed or compiled; the model runs once, on two samples.

    Args:
        model: any module.
        args: the model's positional inputs, a tuple, as torch.export takes them; of one tensor [B, ...] itself will do.
        kwargs: its keyword inputs.
        constant_inputs: see `optimize`.

    Returns:
        A table of blocks: index, where, kind, tokens, attention kernel, and whether tokens can leave after it,
        or the reason why not.

    Raises:
        CaptureError: torch.export cannot capture the model.
    """
    args, kwargs = args if isinstance(args, tuple) else (args,), dict(kwargs or {})
    check_inputs(model, flatten(args, kwargs)[0])
    constant = constant_leaves(model, args, kwargs, constant_inputs)
    return explained(model, prepare(model, args, kwargs, lower=True, constant=constant))


def explained(model: nn.Module, prepared: PassResult) -> Explanation:
    """`explain` of a model that is captured already, attention lowered."""
    rows = []
    blocks, branches, choices = block_kernels(prepared.gm)
    for block in blocks:
        answer = prunable(prepared.gm, block, branches)
        kinds = [b.kind for b in (block.attention, block.mlp) if b is not None]
        shape = block.output.meta["val"].shape
        tokens = (
            math.prod(int(size) for size in shape[1:-1])
            if len(shape) in (3, 4) and isinstance(shape[1], int)
            else (int(shape[0]) if isinstance(shape[0], int) else None)
        )
        rows.append(
            ExplanationRow(
                block.index,
                block.where,
                " + ".join(kinds),
                tokens,
                *kernel_cells(choices.get(block.index)),
                answer.able,
                answer.reason,
                ", ".join(_place(blocks, node) for node in answer.until),
                sequences_per_sample(block.output),
            )
        )
    stages = []
    for stage in find_stages(prepared.gm):
        able, reason = cuttable(stage)
        stages.append(StageExplanation(stage.index, stage.where, len(stage.blocks), stage.grid, able, reason))
    notes = [
        f"blocks {a.index} and {b.index} are parallel branches of one sum: tokens leave after one of them"
        for a, b in pairwise(blocks)
        if a.output is b.output
    ]
    if not blocks and not stages:
        found = sorted({f"{b.kind} ({b.reason})" if b.reason else b.kind for b in branches})
        notes.append("no residual MLP branch found" + (f"; branches found: {', '.join(found[:4])}" if found else ""))
    return Explanation(type(model).__name__, tuple(rows), prepared.skips, tuple(notes), tuple(stages))


def _place(blocks: Sequence[Block], add: Node) -> str:
    """A residual sum in words."""
    for block in blocks:
        if block.output is add:
            return f"the end of block {block.index}"
        if block.attention is not None and block.attention.add is add:
            return f"the middle of block {block.index}"
    return module_path(add) or source_line(add)
