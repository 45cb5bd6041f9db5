"""Ops that pick or put together tokens: allowed at the borders of the tokens that always stay."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from passes.axes.rules.pointwise import align, broadcast, no_weights, tensors
from passes.axes.rules.registry import Context, Position, Transfer, Untransferable, need_free, need_whole, rules_for
from passes.graph.codes import Code
from passes.graph.layout import Batch, Dim, Fixed, Free, Layout, Maps, Piece, Tokens, lines_in, merged, tokens_in
from passes.graph.ops import argument, shape_of, sizes_of, wrap

aten = torch.ops.aten


def _alone(dim: Dim) -> Tokens:
    """The tokens of a dimension that nothing else is folded into."""
    over = tokens_in(dim)
    assert over is not None
    if len(dim) != 1:
        raise Untransferable("picks from tokens that are folded with another dimension", code=Code.EVERY_TOKEN)
    need_whole(dim, "picks from")
    return over


def _unweighted(over: Tokens) -> None:
    if over.weights:
        raise Untransferable("picks single attention weights", code=Code.EVERY_TOKEN)


@rules_for(aten.slice.Tensor, aten.narrow.default)
def slice_(node: Node, ctx: Context) -> Transfer:
    """A stretch between borders: `x[:, 1:]`, `x[:, :n_prefix]`."""
    layout = ctx.carried(node)
    d = wrap(argument(node, "dim"), len(layout))
    if tokens_in(layout[d]) is None:
        return Transfer(layout[:d] + (ctx.resized(layout[d], shape_of(node)[d], "picks"),) + layout[d + 1 :])
    over, size = _alone(layout[d]), int(shape_of(node)[d])
    if argument(node, "step", 1) != 1:
        raise Untransferable("takes every other token", code=Code.EVERY_TOKEN)
    start = argument(node, "start") or 0
    start = max(0, min(wrap(start, over.dense), over.dense))
    part = over.cut(start, start + size)
    if part is None:
        raise Untransferable(
            f"takes tokens {start} to {start + size} of {over.dense}, some of which may be pruned",
            code=Code.PICKS_A_TOKEN,
        )
    if part != over:
        _unweighted(over)
    out = layout[:d] + (merged((part,)),) + layout[d + 1 :]
    args = (node.args[0], d, Position(over, start), Position(over, start + size))
    return Transfer(out, target=aten.slice.Tensor, args=args, kwargs={})


@rules_for(aten.select.int)
def select(node: Node, ctx: Context) -> Transfer:
    """One token that always stays: the class token."""
    layout = ctx.carried(node)
    d = wrap(argument(node, "dim"), len(layout))
    rest = layout[:d] + layout[d + 1 :]
    if tokens_in(layout[d]) is None:
        need_free(layout, [d], "selects an entry, which")
        return Transfer(rest)
    over = _alone(layout[d])
    _unweighted(over)
    index = wrap(argument(node, "index"), over.dense)
    part = over.cut(index, index + 1)
    if part is None or part.prunable:
        raise Untransferable(f"reads token {index} of {over.dense}, which may be pruned", code=Code.PICKS_A_TOKEN)
    return Transfer(rest, args=(node.args[0], d, Position(over, index)), kwargs={})


@rules_for(
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.chunk.default,
    aten.tensor_split.indices,
    aten.tensor_split.sections,
    maps=True,
)
def split(node: Node, ctx: Context) -> Transfer:
    """Several stretches at once, cut at borders."""
    layout = ctx.carried(node)
    d = wrap(argument(node, "dim"), len(layout))
    parts = node.meta["val"]
    if tokens_in(layout[d]) is None:
        if lines_in(layout[d]):
            need_free(layout, [d], "a split")
        dims = [ctx.resized(layout[d], p.shape[d], "splits a dimension that runs over the") for p in parts]
        return Transfer(tuple(layout[:d] + (dim,) + layout[d + 1 :] for dim in dims))
    over = _alone(layout[d])
    _unweighted(over)
    out: list[Layout] = []
    borders: list[int] = [0]
    for p in parts:
        borders.append(borders[-1] + int(p.shape[d]))
        part = over.cut(*borders[-2:])
        if part is None:
            raise Untransferable(
                f"splits the tokens at {borders[-1]} of {over.dense}, between tokens that may go",
                code=Code.PICKS_A_TOKEN,
            )
        out.append(layout[:d] + (merged((part,)),) + layout[d + 1 :])
    cuts = [Position(over, b) for b in borders[1:-1]]
    return Transfer(tuple(out), target=aten.tensor_split.indices, args=(node.args[0], cuts, d), kwargs={})


@rules_for(operator.getitem, maps=True)
def getitem(node: Node, ctx: Context) -> Transfer:
    """One result of an op that has several."""
    layouts: Any = ctx.layout(node.args[0])
    return Transfer(layouts[node.args[1]])


@rules_for(aten.cat.default, aten.concat.default, aten.concatenate.default, maps=True)
def cat(node: Node, ctx: Context) -> Transfer:
    """Joins along tokens (a class token, the patches) or along channels."""
    given: Any = node.args[0]
    inputs = [n for n in given if shape_of(n) != (0,)]  # torch joins an empty vector (a cache, at first) to anything
    d = wrap(argument(node, "dim"), len(shape_of(node)))
    shapes = [ctx.sides(n) for n in inputs]
    pairs = broadcast(_Without(ctx, d), tensors(inputs), tuple(s for i, s in enumerate(shape_of(node)) if i != d))
    along = [layout[d] for layout in shapes]
    if any(lines_in(dim) for dim in along):
        need_free(along, range(len(along)), "a concatenation")
    if any(tokens_in(dim) for dim in along):
        pieces: list[Piece] = []
        for n, dim in zip(inputs, along, strict=True):
            if tokens_in(dim):
                over = _alone(dim)
                _unweighted(over)
                pieces.extend(over.pieces)
            else:
                size = shape_of(n)[d]
                if not isinstance(size, int):
                    raise Untransferable("joins tokens with a stretch of unknown length", code=Code.OTHER_SEQUENCE)
                pieces.append(Fixed(size))
        dim = merged((Tokens.of(pieces),))
    else:
        samples = next((dim for dim in along if any(isinstance(f, Batch) for f in dim)), ())
        dim = ctx.resized(samples, shape_of(node)[d], "joins the")
    out = pairs[:d] + (dim,) + pairs[d:]
    hidden = out[:d] + ((),) + out[d + 1 :]  # along d nothing pairs up
    aligned = align(ctx, tensors(inputs), hidden)
    if aligned and any(isinstance(f, Maps) and f.parted for f in dim):
        raise Untransferable("joins samples of a map from before the cut", code=Code.SAMPLES_MEET)
    return Transfer(out, aligned)


class _Without(Context):
    """The context with one dimension left out of every layout."""

    def __init__(self, ctx: Context, dim: int) -> None:
        super().__init__({}, ctx.batch)
        self._ctx, self._dim = ctx, dim

    def layout(self, node: Any) -> Layout | None:
        own = self._ctx.layout(node)
        return None if own is None else own[: self._dim] + own[self._dim + 1 :]


@rules_for(aten.stack.default, maps=True)
def stack(node: Node, ctx: Context) -> Transfer:
    """A new dimension; the others pair up."""
    inputs: Any = node.args[0]
    d = wrap(argument(node, "dim"), len(shape_of(node)))
    shape = shape_of(node)
    pairs = broadcast(ctx, tensors(inputs), shape[:d] + shape[d + 1 :])
    return Transfer(pairs[:d] + (ctx.plain(shape[d]),) + pairs[d:], align(ctx, tensors(inputs), pairs))


@rules_for(aten.index.Tensor, maps=True)
def index(node: Node, ctx: Context) -> Transfer:
    """One constant list of entries of a dimension that runs neither over tokens nor over samples."""
    layout = ctx.carried(node)
    indices: Any = node.args[1]
    used = [d for d, i in enumerate(indices) if i is not None]
    if len(used) != 1 or len(shape_of(indices[used[0]])) != 1 or ctx.layout(indices[used[0]]) is not None:
        raise Untransferable("indexes with several or computed index tensors", code=Code.FORM)
    need_free(layout, used, "indexes a dimension that")
    d = used[0]
    return Transfer(layout[:d] + (ctx.plain(shape_of(node)[d]),) + layout[d + 1 :])


def _beside(node: Node, ctx: Context, d: int, inputs: list[Node], verb: str) -> Layout:
    """The dims but d of inputs that are read, or written, token by token along d."""
    pairs = broadcast(_Without(ctx, d), inputs, shape_of(node)[:d] + shape_of(node)[d + 1 :])
    sizes = [sizes_of(n) for n in inputs]
    for i, dim in enumerate(pairs[:d] + ((),) + pairs[d:]):
        if not all(isinstance(f, Free) for f in dim) and len({s[i] for s in sizes if s is not None}) > 1:
            raise Untransferable(f"{verb} for some of the tokens or samples only", code=Code.PICKS_A_TOKEN)
    return tuple(no_weights(dim) for dim in pairs)  # what comes out need not sum to one


@rules_for(aten.gather.default)
def gather(node: Node, ctx: Context) -> Transfer:
    """Entries of a dimension that does not run over tokens, picked for each token: a table of relative positions."""
    source, index = node.args[0], argument(node, "index")
    assert isinstance(source, Node) and isinstance(index, Node)
    d = wrap(argument(node, "dim"), len(shape_of(node)))
    given, picks = ctx.sides(source), ctx.sides(index)
    need_free(given, [d], "picks entries of a dimension that")
    pairs = _beside(node, ctx, d, [source, index], "picks")
    out = pairs[:d] + (no_weights(picks[d]),) + pairs[d:]
    aligned = align(ctx, [source], pairs[:d] + (given[d],) + pairs[d:]) | align(ctx, [index], out)
    return Transfer(out, aligned)


@rules_for(aten.scatter.value, aten.scatter.src)
def scatter(node: Node, ctx: Context) -> Transfer:
    """Entries of a dimension that does not run over tokens, written for each token: one-hot assignments."""
    inputs = tensors([node.args[0], argument(node, "index"), argument(node, "src", None)])
    d = wrap(argument(node, "dim"), len(shape_of(node)))
    sides = [ctx.sides(n) for n in inputs]
    for side in sides:
        need_free(side, [d], "writes entries of a dimension that")
    pairs = _beside(node, ctx, d, inputs, "writes")
    aligned: dict[Node, Layout] = {}
    for n, side in zip(inputs, sides, strict=True):
        aligned |= align(ctx, [n], pairs[:d] + (side[d],) + pairs[d:])
    return Transfer(pairs[:d] + (no_weights(sides[0][d]),) + pairs[d:], aligned)


@rules_for(aten.index_select.default, maps=True)
def index_select(node: Node, ctx: Context) -> Transfer:
    """As `index`, in its older spelling."""
    layout = ctx.carried(node)
    d = wrap(argument(node, "dim"), len(layout))
    need_free(layout, [d], "indexes a dimension that")
    return Transfer(layout[:d] + (ctx.plain(shape_of(node)[d]),) + layout[d + 1 :])


@rules_for(aten.constant_pad_nd.default, aten.pad.default)
def pad(node: Node, ctx: Context) -> Transfer:
    """Pads dimensions that do not run over tokens."""
    layout = ctx.carried(node)
    pads = list(argument(node, "pad"))
    out = list(layout)
    for i in range(0, len(pads), 2):
        d = len(layout) - 1 - i // 2
        if pads[i] or pads[i + 1]:
            need_free(layout, [d], "pads a dimension that")
            out[d] = ctx.plain(shape_of(node)[d])
    return Transfer(tuple(out))
