"""Products and attention: tokens may be summed over only with weights that attention normalised."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.axes.rules.full_length import paired
from passes.axes.rules.pointwise import align, broadcast, joined, no_weights
from passes.axes.rules.registry import Context, Transfer, Untransferable, need_free, need_whole, rules_for
from passes.graph.codes import Code
from passes.graph.layout import Batch, Dim, Layout, tokens_in
from passes.graph.ops import argument, shape_of

aten = torch.ops.aten


@rules_for(aten.linear.default, maps=True)
def linear(node: Node, ctx: Context) -> Transfer:
    """Acts on channels; a linear layer over tokens has a fixed number of them."""
    layout = ctx.carried(node)
    if tokens_in(layout[-1]):
        raise Untransferable("a linear layer over the tokens, of a fixed size", code=Code.EVERY_TOKEN)
    need_free(layout, [-1], "a linear layer")
    return Transfer(layout[:-1] + (ctx.plain(shape_of(node)[-1]),))


def _contracted(a: Dim, b: Dim) -> Dim:
    """The dimension that a product sums over, having checked that it may."""
    over_a, over_b = tokens_in(a), tokens_in(b)
    if any(isinstance(f, Batch) for f in a + b):
        raise Untransferable("sums over the samples of the batch", code=Code.SAMPLES_MEET)
    if over_a is None and over_b is None:
        return ()
    if not any(t is not None and t.weights for t in (over_a, over_b)):
        raise Untransferable(
            "sums over tokens with weights that no softmax over tokens has normalised", code=Code.EVERY_TOKEN
        )
    return joined([d for d in (a, b) if tokens_in(d)]) or ()


def _mixes_heads(over: Dim, ctx: Context, *factors: Node) -> bool:
    """Whether a product sums over heads, not tokens, by what has no tokens: attention weights may be summed over still.

    Args:
        over: what it sums over.
    """
    return tokens_in(over) is None and sum(ctx.layout(n) is not None for n in factors) == 1


class _Cut(Context):
    """The context with the last two dimensions left out: what products broadcast over."""

    def __init__(self, ctx: Context) -> None:
        super().__init__({}, ctx.batch)
        self._ctx = ctx

    def layout(self, node: Any) -> Layout | None:
        own = self._ctx.layout(node)
        return None if own is None else own[:-2]


def _product(node: Node, ctx: Context, a: Node, b: Node, *more: Node) -> Transfer:
    la, lb = ctx.sides(a), ctx.sides(b)
    if len(la) < 2 or len(lb) < 2:
        raise Untransferable("a product with a vector", code=Code.FORM)
    over = _contracted(la[-1], lb[-2])
    pairs = broadcast(_Cut(ctx), [a, b], shape_of(node)[:-2])
    out = pairs + (la[-2], lb[-1])
    if not _mixes_heads(over, ctx, a, b):
        out = tuple(no_weights(dim) for dim in out)
    sides = [(a, pairs + (la[-2], over)), (b, pairs + (over, lb[-1])), *((n, out) for n in more)]
    summed = tokens_in(over) is not None
    crossed = tokens_in(la[-2]) is not None and tokens_in(lb[-1]) is not None
    return paired(node, ctx, out, sides, summed, mixes=summed or crossed)


@rules_for(aten.matmul.default, aten.bmm.default, aten.mm.default, aten._int_mm.default)
def matmul(node: Node, ctx: Context) -> Transfer:
    """[..., i, k] times [..., k, j]."""
    a, b = node.args[:2]
    assert isinstance(a, Node) and isinstance(b, Node)
    return _product(node, ctx, a, b)


@rules_for(aten.addmm.default, aten.baddbmm.default)
def addmm(node: Node, ctx: Context) -> Transfer:
    """A product, and something added that pairs up with the result."""
    bias, a, b = node.args[:3]
    assert isinstance(bias, Node) and isinstance(a, Node) and isinstance(b, Node)
    return _product(node, ctx, a, b, bias)


@rules_for(aten.einsum.default)
def einsum(node: Node, ctx: Context) -> Transfer:
    """Each letter is a dimension; letters that vanish are summed over."""
    equation: Any = node.args[0]
    operands: Any = node.args[1]
    if "." in equation or "->" not in equation:
        raise Untransferable("an einsum with an ellipsis or without an arrow", code=Code.FORM)
    left, right = equation.replace(" ", "").split("->")
    terms = left.split(",")
    met: dict[str, list[Dim]] = {letter: [] for letter in "".join(terms)}
    beside: dict[str, list[Dim]] = {letter: [] for letter in met}
    for term, n in zip(terms, operands, strict=True):
        for letter, dim in zip(term, ctx.sides(n), strict=True):
            (beside if ctx.layout(n) is None else met)[letter] += [dim] if dim else []
    whole = {letter: joined(group) or [*group, *beside[letter], ()][0] for letter, group in met.items()}
    sums = set("".join(terms)) - set(right)
    for letter in sums:
        if any(isinstance(f, Batch) for f in whole[letter]):
            raise Untransferable("sums over the samples of the batch", code=Code.SAMPLES_MEET)
        over = tokens_in(whole[letter])
        if over and not over.weights:
            raise Untransferable(
                "sums over tokens with weights that no softmax over tokens has normalised", code=Code.EVERY_TOKEN
            )
    heads = _mixes_heads(tuple(f for letter in sums for f in whole[letter]), ctx, *operands)
    dims = {letter: dim if heads else no_weights(dim) for letter, dim in whole.items()}
    sides = [(n, tuple(dims[letter] for letter in term)) for term, n in zip(terms, operands, strict=True)]
    over_tokens = {letter for letter in dims if tokens_in(dims[letter])}
    summed = bool(sums & over_tokens)
    out = tuple(dims[letter] for letter in right)
    return paired(node, ctx, out, sides, summed, mixes=summed or len(over_tokens) > 1)


@rules_for(aten.scaled_dot_product_attention.default)
def attention(node: Node, ctx: Context) -> Transfer:
    """Tokens to tokens: queries keep their sequence, keys and values share theirs, a mask pairs up with both."""
    query, key, value = (n for n in node.args[:3])
    mask = argument(node, "attn_mask")
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    lq, lk, lv = ctx.sides(query), ctx.sides(key), ctx.sides(value)
    for layout in (lq, lk, lv):
        need_free(layout, [-1], "the channels of attention")
    if any(isinstance(f, Batch) for f in lk[-2] + lv[-2]):
        raise Untransferable("attends over the samples of the batch", code=Code.SAMPLES_MEET)
    for dim in (lk[-2], lv[-2]):
        need_whole(dim, "attends to")
    over, of_value = tokens_in(lk[-2]), tokens_in(lv[-2])
    if (over is None) != (of_value is None):
        raise Untransferable("keys and values belong to different sequences", code=Code.OTHER_SEQUENCE)
    joined([lk[-2], lv[-2]])
    causal = bool(argument(node, "is_causal"))
    if causal and lq[-2] != lk[-2]:
        raise Untransferable("causal attention between different sequences", code=Code.OTHER_SEQUENCE)
    pairs = broadcast(_Cut(ctx), [query, key, value], shape_of(node)[:-2])
    aligned: dict[Node, Layout] = {}
    for n, layout in ((query, lq), (key, lk), (value, lv)):
        heads = pairs if len(layout) == len(pairs) + 2 else pairs[-(len(layout) - 2) :]
        aligned |= align(ctx, [n], heads + layout[-2:])
    if isinstance(mask, Node):
        aligned |= align(ctx, [mask], pairs + (lq[-2], lk[-2]))
    return Transfer(pairs + (lq[-2], lv[-1]), aligned, mixes=over is not None, ordered=causal)


@rules_for(aten.conv1d.default, aten.conv2d.default)
def conv(node: Node, ctx: Context) -> Transfer:
    """[B, C, N], or attention maps [B, H, N, N], with a kernel of one entry: a linear layer of channels or heads."""
    layout = ctx.carried(node)
    weight = node.args[1]
    assert isinstance(weight, Node)
    steps, pads = argument(node, "stride"), argument(node, "padding")
    if any(size != 1 for size in shape_of(weight)[2:]) or any(step != 1 for step in steps) or any(pads):
        raise _on_grid(node)
    need_free(layout, [1], "a convolution")
    return Transfer((layout[0], ctx.plain(shape_of(node)[1]), *layout[2:]))


@rules_for(aten.conv3d.default, aten.convolution.default)
def on_grid(node: Node, ctx: Context) -> Transfer:
    """A convolution needs a grid, and a pruned sequence has none."""
    raise _on_grid(node)


@rules_for(aten.im2col.default, aten.col2im.default, aten.unfold.default)
def windows(node: Node, ctx: Context) -> Transfer:
    """Soft split: windows that overlap become tokens."""
    raise Untransferable(
        "cuts the tokens' grid into windows, or joins them, and needs every token", code=Code.EVERY_TOKEN
    )


def _on_grid(node: Node) -> Untransferable:
    if node.target is aten.conv1d.default:
        return Untransferable("a convolution over the sequence of tokens", code=Code.EVERY_TOKEN)
    return Untransferable("a convolution, which needs the tokens on their full grid", code=Code.EVERY_TOKEN)
