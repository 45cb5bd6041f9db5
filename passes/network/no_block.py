"""What a model without blocks has in their place, as a refusal."""

from __future__ import annotations

from torch.fx import GraphModule

from passes.axes.token_axis import stream_layout
from passes.graph.base import Refusal
from passes.graph.codes import Code
from passes.graph.ops import CONV, LINEAR
from passes.network.branches import Branch
from passes.network.stages import find_stages


def no_block(gm: GraphModule, branches: list[Branch]) -> Refusal:
    """Says what there is in place of a block."""
    # a mixer has linear layers, so it is nearer than a convolution
    nearest = min(branches, key=lambda b: b.kind != "mixer", default=None)
    if nearest is None:
        last = next((n for n in reversed(gm.graph.nodes) if n.target in LINEAR | CONV), None)
        return Refusal(
            "the model has no residual branch: nothing up to this last layer is x + f(x), so there is no block that "
            "tokens or rows could leave behind",
            last,
            "none for models without residual sums; a sum in other ops than aten.add is not looked for",
            code=Code.NO_BLOCK,
        )
    why = nearest.reason or "no residual MLP follows it"
    return Refusal(
        "the model has no residual MLP branch on [batch, tokens, channels]; nearest to one comes this "
        f"{nearest.kind} branch ({why})",
        nearest.at or nearest.add,
        _way_out(gm, nearest),
        code=Code.NO_BLOCK,
    )


def _way_out(gm: GraphModule, nearest: Branch) -> str:
    if find_stages(gm):
        return "a CNN's stages lose rows and columns with Schedule(grid={stage: GridPrune(rows, columns)})"
    try:
        stream_layout(nearest.stream)
    except Refusal as refusal:
        return refusal.way_out
    return (
        "rs_compile.explain(model, inputs) shows what was found; an op of your own gets a rule by "
        "rs_compile.register_token_rule; a layer with windows needs every token of them"
    )
