"""The rules of the token axis asked the other way: from which positions of its inputs some of a result's are made."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from passes.axes.rules import Context, Transfer, Untransferable, rule_for
from passes.axes.rules.pointwise import tensors
from passes.graph.aliasing import writes
from passes.graph.layout import Batch, Layout, Part, dim_size, expr, plain, runs_over_tokens, tokens_in
from passes.graph.ops import argument, shape_of, sizes_of
from passes.graph.regroup import regroup

aten = torch.ops.aten


@dataclass(frozen=True)
class Made:
    """How some positions of a result are made of the same positions of inputs.

    Args:
        transfer: what the op does on them alone.
        inputs: the inputs that have an entry for each position, with their layouts.
    """

    transfer: Transfer
    inputs: Mapping[Node, Layout]


def made_of(node: Node, out: Layout | Mapping[int, Layout], batch: Batch) -> Made | None:
    """The inputs from which the same positions must be read, or None where a position depends on others as well.

    A rule says what comes out of a layout. Every layout that an input may have is tried, until the rule gives `out`.

    Args:
        node: the op.
        out: the layout of its result; of an op with several results, those that are read.
        batch: the factor of samples.
    """
    if node.op != "call_function" or writes(node) or _draws(node):
        return None
    if node.target is operator.getitem and isinstance(node.args[0], Node) and not isinstance(out, Mapping):
        return Made(Transfer(out), {node.args[0]: out})
    if node.target is aten.linear.default and not isinstance(out, Mapping) and tokens_in(out[-1]):
        return _rows_of_weight(node, out)
    rule = rule_for(node.target)
    if rule is None:
        return None
    wanted = next(iter(out.values())) if isinstance(out, Mapping) else out
    for n in tensors((node.args, node.kwargs)):
        for layout in _candidates(n, wanted, batch):
            try:
                transfer = rule(node, Context({n: layout}, batch))
                inputs = {n: layout, **{m: _own(m, t, batch) for m, t in transfer.aligned.items()}}
            except (Untransferable, AssertionError, IndexError, KeyError, TypeError, ValueError):
                continue
            if not transfer.mixes and not transfer.beside and _gives(transfer.out, out):
                return Made(transfer, inputs)
    return None


def _gives(found: Any, wanted: Layout | Mapping[int, Layout]) -> bool:
    if isinstance(wanted, Mapping):
        return isinstance(found, tuple) and all(found[i] == layout for i, layout in wanted.items())
    return bool(found == wanted)


def _candidates(node: Node, wanted: Layout, batch: Batch) -> Iterator[Layout]:
    """Layouts of an input in which one dimension runs over the positions that one of the result's does."""
    shape = shape_of(node)
    whole = regroup(wanted, shape)
    if whole is not None and runs_over_tokens(whole) and not any(isinstance(f, Part) for dim in whole for f in dim):
        yield whole
    over = next(dim for dim in wanted if tokens_in(dim))
    for at, size in enumerate(shape):
        if expr(size) - dim_size(over) == 0:
            yield tuple(over if d == at else plain(s, batch) for d, s in enumerate(shape))


def _own(node: Node, target: Layout, batch: Batch) -> Layout:
    """The layout of an input that meets `target`, and has an entry for each of its positions."""
    shape = shape_of(node)
    pairs = zip(shape, target[len(target) - len(shape) :], strict=True)
    return tuple(dim if tokens_in(dim) and expr(size) != 1 else plain(size, batch) for size, dim in pairs)


def _rows_of_weight(node: Node, out: Layout) -> Made | None:
    """Some channels of a linear layer are made by as many rows of its weight."""
    weight, *bias = (n for n in tensors((node.args, node.kwargs)) if n is not node.args[0])
    size = sizes_of(weight)
    if any(tokens_in(dim) for dim in out[:-1]) or size is None or len(size) != 2:
        return None
    inputs = {weight: (out[-1], plain(size[1], Batch(expr(1)))), **dict.fromkeys(bias, (out[-1],))}
    return Made(Transfer(out), inputs)


def _draws(node: Node) -> bool:
    """Whether an op draws random numbers: on fewer positions they would be others."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(argument(node, "dropout_p") != 0)
    if node.target is aten.dropout.default:
        return bool(argument(node, "train")) and argument(node, "p") != 0
    return True
