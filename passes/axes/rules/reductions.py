"""Norms, reductions and softmax: over channels they carry the axis on; the mean over tokens ends it."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.axes.rules.registry import Context, Transfer, Untransferable, need_free, need_whole, rules_for
from passes.axes.rules.views import without
from passes.graph.codes import Code
from passes.graph.layout import Dim, Line, Tokens, followed, holds_lines, tokens_in
from passes.graph.ops import SOFTMAX, argument, shape_of, wrap

aten = torch.ops.aten


@rules_for(
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.native_layer_norm.default,
    aten._fused_rms_norm.default,
    maps=True,
)
def norm(node: Node, ctx: Context) -> Transfer:
    """Normalises the last dimensions, which must be channels."""
    layout = ctx.carried(node)
    last = len(argument(node, "normalized_shape"))
    need_free(layout, range(len(layout) - last, len(layout)), "a norm")
    val = node.meta["val"]
    if isinstance(val, torch.Tensor):
        return Transfer(layout)
    stats = without(layout, set(range(len(layout) - last, len(layout))), keepdim=True)
    return Transfer((layout, *(stats for _ in val[1:])))


@rules_for(aten.batch_norm.default)
def batch_norm(node: Node, ctx: Context) -> Transfer:
    """With running statistics it is an affine map of channels (dimension 1)."""
    layout = ctx.carried(node)
    if argument(node, "training"):
        raise Untransferable("batch norm in training mode, whose statistics run over tokens", code=Code.TRAIN_MODE)
    need_free(layout, [1], "batch norm")
    return Transfer(layout)


_REDUCTIONS = (
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim,
    aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.var.correction, aten.var.dim, aten.std.correction,
    aten.std.dim, aten.var_mean.correction, aten.var_mean.dim, aten.logsumexp.default, aten.prod.dim_int, aten.any.dim,
    aten.all.dim, aten.argmax.default, aten.argmin.default,
)  # fmt: skip
# mean the same over fewer tokens, and over fewer rows and columns
_OVER = {
    Tokens: {aten.mean.dim, aten.amax.default},
    Line: {
        aten.mean.dim, aten.amax.default, aten.amin.default, aten.var.correction, aten.var.dim, aten.std.correction,
        aten.std.dim, aten.var_mean.correction, aten.var_mean.dim,
    },
}  # fmt: skip


@rules_for(*_REDUCTIONS, maps=True)
def reduction(node: Node, ctx: Context) -> Transfer:
    """Over channels anything goes; over tokens, rows or columns what does not depend on how many there are."""
    layout = ctx.carried(node)
    given: Any = argument(node, "dim")
    keepdim = bool(argument(node, "keepdim"))
    dims = range(len(layout)) if given is None or given == [] else [given] if isinstance(given, int) else given
    over = {wrap(d, len(layout)) for d in dims}
    shorter = {d: f for d in over if (f := followed(layout[d])) is not None}
    need_free(layout, over - shorter.keys(), "a reduction")
    for d, f in shorter.items():
        alone = len(layout[d]) == 1 or isinstance(f, Line)  # nothing but columns is folded with rows
        weights = isinstance(f, Tokens) and f.weights and node.target is aten.sum.dim_IntList
        kind = Line if isinstance(f, Line) else Tokens
        if not alone or not (weights or node.target in _OVER[kind]):
            raise Untransferable(
                f"a reduction over {f.named.many} that depends on how many there are", code=f.named.code
            )
    out = without(layout, over, keepdim)
    val = node.meta["val"]
    mixes = bool(shorter) or holds_lines(layout)  # what lost its channels is no map to give back as it was
    return Transfer(tuple(out for _ in val) if isinstance(val, (tuple, list)) else out, mixes=mixes)


@rules_for(*SOFTMAX)
def softmax(node: Node, ctx: Context) -> Transfer:
    """Over channels it is per token; over keys it makes attention weights, to be summed over later."""
    layout = ctx.carried(node)
    d = wrap(argument(node, "dim"), len(layout))
    if tokens_in(layout[d]) is None:
        need_free(layout, [d], "a softmax")
        return Transfer(layout)
    if len(layout[d]) != 1:
        raise Untransferable("a softmax over tokens that are folded with another dimension", code=Code.EVERY_TOKEN)
    need_whole(layout[d], "a softmax over")
    weights: Dim = tuple(Tokens(f.pieces, True) if isinstance(f, Tokens) else f for f in layout[d])
    return Transfer(layout[:d] + (weights,) + layout[d + 1 :], mixes=True)


@rules_for(aten.log_softmax.int, aten.cumsum.default, aten.glu.default, maps=True)
def along(node: Node, ctx: Context) -> Transfer:
    """Works along one dimension, which must be channels."""
    layout = ctx.carried(node)
    d = wrap(argument(node, "dim"), len(layout))
    need_free(layout, [d], "an op along a dimension that")
    return Transfer(layout[:d] + (ctx.plain(shape_of(node)[d]),) + layout[d + 1 :])


@rules_for(aten.adaptive_avg_pool1d.default)
def pool(node: Node, ctx: Context) -> Transfer:
    """[B, C, N] pooled to one entry is the mean over tokens."""
    layout = ctx.carried(node)
    if tokens_in(layout[-1]) is None:
        need_free(layout, [-1], "pooling")
        return Transfer((*layout[:-1], ctx.plain(shape_of(node)[-1])))
    if len(layout[-1]) != 1 or argument(node, "output_size") not in (1, [1]):
        raise Untransferable("pools tokens into more than one", code=Code.EVERY_TOKEN)
    return Transfer((*layout[:-1], ()), mixes=True)
