"""Ops that move dimensions about. Their literal sizes follow from the layout of the result."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.axes.rules.registry import (
    Context,
    Extent,
    Transfer,
    Untransferable,
    argument,
    need_free,
    rules_for,
    shape_of,
    wrap,
)
from passes.graph.layout import Batch, Layout, merged, regroup, show, tokens_in

aten = torch.ops.aten


def carried(node: Node, ctx: Context) -> Layout:
    """The layout of an op's first input, which must be the one that carries tokens."""
    layout = ctx.layout(node.args[0])
    if layout is None:
        raise Untransferable("only a side input of it carries tokens")
    return layout


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
    layout = carried(node, ctx)
    out = regroup(layout, shape_of(node))
    if out is None:
        shape = [str(s) for s in shape_of(node)]
        rows = f", or its {ctx.batch.sequences} sequences a sample" if ctx.batch.sequences > 1 else ""
        raise Untransferable(f"reshapes {show(layout)} to [{', '.join(shape)}], which splits the token axis{rows}")
    return Transfer(out, target=aten.reshape.default, args=(node.args[0], [Extent(d) for d in out]), kwargs={})


_PERMUTING = (
    aten.permute.default, aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.t.default,
    aten.mT.default, aten.adjoint.default, aten.numpy_T.default, aten.movedim.int, aten.movedim.intlist,
    aten.moveaxis.int, aten.moveaxis.intlist,
)  # fmt: skip


def permuted(node: Node) -> list[int] | None:
    """For each dimension of the result of a permuting op, the one it was; None for other ops."""
    if node.target not in _PERMUTING:
        return None
    rank = len(shape_of(node))
    order = list(range(rank))
    given: Any = node.args
    name = str(node.target).split(".")[1]
    if name in ("permute", "movedim", "moveaxis"):
        dims = argument(node, 1, "dims")
        if name == "permute":
            return [wrap(d, rank) for d in dims]
        source, to = ([a] if isinstance(a, int) else a for a in given[1:3])
        moved = dict(zip((wrap(d, rank) for d in to), (wrap(d, rank) for d in source), strict=True))
        rest = iter(d for d in order if d not in moved.values())
        return [moved[d] if d in moved else next(rest) for d in range(rank)]
    a, b = given[1:3] if len(given) == 3 else (-2, -1)
    if name == "numpy_T":
        return order[::-1]
    if rank < 2:
        return order
    a, b = wrap(a, rank), wrap(b, rank)
    order[a], order[b] = order[b], order[a]
    return order


@rules_for(*_PERMUTING)
def permute(node: Node, ctx: Context) -> Transfer:
    """Dimensions change places, and take their factors along."""
    layout = carried(node, ctx)
    order = permuted(node)
    assert order is not None
    return Transfer(tuple(layout[d] for d in order))


@rules_for(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(node: Node, ctx: Context) -> Transfer:
    """Dimensions of size one grow; the others stay."""
    layout, shape = carried(node, ctx), shape_of(node)
    layout = ((),) * (len(shape) - len(layout)) + layout
    out = tuple(dim if dim else ctx.plain(size) for dim, size in zip(layout, shape, strict=True))
    return Transfer(out, target=aten.expand.default, args=(node.args[0], [Extent(d) for d in out]), kwargs={})


@rules_for(aten.repeat.default)
def repeat(node: Node, ctx: Context) -> Transfer:
    """Repeats along dimensions that do not run over tokens or samples."""
    layout, repeats = carried(node, ctx), argument(node, 1, "repeats")
    layout = ((),) * (len(repeats) - len(layout)) + layout
    out = []
    for dim, times, size in zip(layout, repeats, shape_of(node), strict=True):
        if times == 1:
            out.append(dim)
        elif tokens_in(dim):
            raise Untransferable("repeats the sequence of tokens")
        elif any(isinstance(f, Batch) for f in dim):
            raise Untransferable("repeats the samples of the batch")
        else:
            out.append(ctx.plain(size))
    return Transfer(tuple(out))


@rules_for(aten.unbind.int)
def unbind(node: Node, ctx: Context) -> Transfer:
    """Takes a dimension apart that does not run over tokens (q, k, v)."""
    layout = carried(node, ctx)
    d = wrap(argument(node, 1, "dim", 0), len(layout))
    if tokens_in(layout[d]):
        raise Untransferable("takes the sequence apart token by token")
    need_free(layout, [d], "takes apart a dimension that")
    rest = layout[:d] + layout[d + 1 :]
    return Transfer(tuple(rest for _ in node.meta["val"]))


@rules_for(aten.flip.default, aten.roll.default)
def reorder(node: Node, ctx: Context) -> Transfer:
    """Reverses or shifts along dimensions that do not run over tokens or samples."""
    layout = carried(node, ctx)
    dims: Any = argument(node, 1, "dims") if node.target is aten.flip.default else argument(node, 2, "dims", [])
    over = [wrap(d, len(layout)) for d in dims] if dims else range(len(layout))
    if any(tokens_in(layout[d]) for d in over):
        raise Untransferable("changes the order of the tokens")
    if any(isinstance(f, Batch) for d in over for f in layout[d]):
        raise Untransferable("changes the order of the samples")
    return Transfer(layout)


@rules_for(aten.sym_size.int)
def sym_size(node: Node, ctx: Context) -> Transfer:
    """The number of samples is the same; the number of tokens is not."""
    layout = carried(node, ctx)
    if tokens_in(layout[wrap(argument(node, 1, "dim"), len(layout))]):
        raise Untransferable("reads the number of tokens as a value")
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
