"""Ops that move dimensions about. Their literal sizes follow from the layout of the result."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.axes.rules.registry import Context, Extent, Transfer, Untransferable, need_free, rules_for
from passes.graph.codes import Code
from passes.graph.layout import Batch, Layout, followed, merged, show, tokens_in
from passes.graph.ops import PERMUTING, argument, permuted, shape_of, wrap
from passes.graph.regroup import regroup

aten = torch.ops.aten


@rules_for(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view_as.default,
    aten.reshape_as.default,
)
def reshape(node: Node, ctx: Context) -> Transfer:
    """Regroups the factors; tokens stay whole."""
    layout = ctx.carried(node)
    out = regroup(layout, shape_of(node))
    if out is None:
        shape = [str(s) for s in shape_of(node)]
        rows = f", or its {ctx.batch.sequences} sequences a sample" if ctx.batch.sequences > 1 else ""
        raise Untransferable(
            f"reshapes {show(layout)} to [{', '.join(shape)}], which splits the token axis{rows}", code=Code.EVERY_TOKEN
        )
    return Transfer(out, target=aten.reshape.default, args=(node.args[0], [Extent(d) for d in out]), kwargs={})


@rules_for(*PERMUTING, maps=True)
def permute(node: Node, ctx: Context) -> Transfer:
    """Dimensions change places, and take their factors along."""
    layout = ctx.carried(node)
    order = permuted(node)
    assert order is not None
    return Transfer(tuple(layout[d] for d in order))


@rules_for(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(node: Node, ctx: Context) -> Transfer:
    """Dimensions of size one grow; the others stay."""
    layout, shape = ctx.carried(node), shape_of(node)
    layout = ((),) * (len(shape) - len(layout)) + layout
    out = tuple(dim if dim else ctx.plain(size) for dim, size in zip(layout, shape, strict=True))
    return Transfer(out, target=aten.expand.default, args=(node.args[0], [Extent(d) for d in out]), kwargs={})


@rules_for(aten.repeat.default)
def repeat(node: Node, ctx: Context) -> Transfer:
    """Repeats along dimensions that do not run over tokens or samples."""
    layout, repeats = ctx.carried(node), argument(node, "repeats")
    layout = ((),) * (len(repeats) - len(layout)) + layout
    out = []
    for dim, times, size in zip(layout, repeats, shape_of(node), strict=True):
        if times == 1:
            out.append(dim)
        elif tokens_in(dim):
            raise Untransferable("repeats the sequence of tokens", code=Code.EVERY_TOKEN)
        elif any(isinstance(f, Batch) for f in dim):
            raise Untransferable("repeats the samples of the batch", code=Code.SAMPLES_MEET)
        else:
            out.append(ctx.plain(size))
    return Transfer(tuple(out))


@rules_for(aten.unbind.int, maps=True)
def unbind(node: Node, ctx: Context) -> Transfer:
    """Takes a dimension apart that does not run over tokens (q, k, v)."""
    layout = ctx.carried(node)
    d = wrap(argument(node, "dim"), len(layout))
    if tokens_in(layout[d]):
        raise Untransferable("takes the sequence apart token by token", code=Code.EVERY_TOKEN)
    need_free(layout, [d], "takes apart a dimension that")
    rest = layout[:d] + layout[d + 1 :]
    return Transfer(tuple(rest for _ in node.meta["val"]))


@rules_for(aten.flip.default, aten.roll.default, maps=True)
def reorder(node: Node, ctx: Context) -> Transfer:
    """Reverses or shifts along dimensions that do not run over tokens or samples."""
    layout = ctx.carried(node)
    dims: Any = argument(node, "dims")
    over = [wrap(d, len(layout)) for d in dims] if dims else range(len(layout))
    if moved := [f for d in over if (f := followed(layout[d]))]:
        raise Untransferable(f"changes the order of the {moved[0].named.many}", code=moved[0].named.code)
    if any(isinstance(f, Batch) for d in over for f in layout[d]):
        raise Untransferable("changes the order of the samples", code=Code.SAMPLES_MEET)
    return Transfer(layout)


@rules_for(aten.sym_size.int, maps=True)
def sym_size(node: Node, ctx: Context) -> Transfer:
    """The number of samples is the same; the number of tokens is not."""
    layout = ctx.carried(node)
    over = followed(layout[wrap(argument(node, "dim"), len(layout))])
    if over is not None:
        raise Untransferable(f"reads the number of {over.named.many} as a value", code=over.named.code)
    return Transfer(None)


@rules_for(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty)
def new(node: Node, ctx: Context) -> Transfer:
    """Reads only dtype and device; what it makes is a side input like any other."""
    return Transfer(None)


def without(layout: Layout, dims: set[int], keepdim: bool) -> Layout:
    """The layout once some dimensions are reduced away."""
    if keepdim:
        return tuple(merged(()) if d in dims else dim for d, dim in enumerate(layout))
    return tuple(dim for d, dim in enumerate(layout) if d not in dims)
