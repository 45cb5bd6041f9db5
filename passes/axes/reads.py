"""Which positions of a value are read at all: the liveness of tokens.

A backward dataflow analysis. It starts at ops that pick positions (a class token, the end of a text) and goes up
through what treats positions one by one, by the rules of the token axis (`passes.axes.backward`). It changes nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.axes.backward import Made, made_of
from passes.graph.layout import Batch, Layout, Prunable, Tokens, expr, plain, tokens_in
from passes.graph.ops import argument, shape_of, wrap

aten = torch.ops.aten
_APART = (  # ops that take a dimension apart
    aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default,
    aten.tensor_split.indices, aten.tensor_split.sections,
)  # fmt: skip
_CASTS = (aten.to, aten._to_copy, aten.clone, aten.detach, aten.alias)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


@dataclass(frozen=True)
class Picks:
    """Positions along a dimension.

    Args:
        fixed: the same for every sample, ascending.
        index: each sample's own, [B] or [B, K], with dimensions of size one anywhere behind; then there are no `fixed`.
        count: how many.
    """

    fixed: tuple[int, ...]
    index: Node | None = None
    count: int = 0

    @classmethod
    def at(cls, positions: Iterable[int]) -> Picks:
        fixed = tuple(sorted({*positions}))
        return cls(fixed, None, len(fixed))

    def among(self, other: Picks) -> Picks:
        """Where these are among others that hold them."""
        return self if self.index is not None else Picks.at(other.fixed.index(p) for p in self.fixed)


@dataclass(frozen=True)
class Picked:
    """An op that reads some positions of a value.

    Args:
        dim: of the value.
        picks: which.
        dropped: whether the result has no such dimension any more.
    """

    dim: int
    picks: Picks
    dropped: bool = False


@dataclass
class Reads:
    """Values of which some positions are read, and by whom.

    Args:
        batch: the factor of samples.
        layouts: in which one dimension runs over the positions, as `Tokens`.
        picks: which of them are read.
        made: those values that can be made at these positions alone.
    """

    batch: Batch
    layouts: dict[Node, Layout] = field(default_factory=dict)
    picks: dict[Node, Picks] = field(default_factory=dict)
    made: dict[Node, Made] = field(default_factory=dict)

    def keep(self, useful: Callable[[Node], bool]) -> None:
        """Forgets values without a useful op on the way to them."""
        kept: set[Node] = set()
        for node in sorted(self.made):
            if useful(node) or any(n in kept for n in self.made[node].inputs):
                kept.add(node)
        self.made = {n: m for n, m in self.made.items() if n in kept}


def analyse(graph: Graph, batch: Batch) -> Reads:
    """What is read of each value. At most half of the positions, or all count as read."""
    found = Reads(batch)
    for node in reversed(graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        if isinstance(node.meta.get("val"), (tuple, list)):
            _several(node, found)
            continue
        read = _read(node, found)
        if read is None:
            continue
        found.layouts[node], found.picks[node] = read
        made = at_picks(node, *read, batch)
        if made is not None:
            found.made[node] = made
    return found


def at_picks(node: Node, layout: Layout | Mapping[int, Layout], picks: Picks, batch: Batch) -> Made | None:
    """`made_of`, or None also where each sample reads its own positions of a value that is the same for all."""
    made = made_of(node, layout, batch)
    if made is None or picks.index is None:
        return made
    outs = layout.values() if isinstance(layout, Mapping) else (layout,)
    read = (*outs, *(made.transfer.aligned.get(n, own) for n, own in made.inputs.items()))
    return made if all(sum(isinstance(f, Batch) for dim in one for f in dim) == 1 for one in read) else None


def _several(node: Node, found: Reads) -> None:
    """An op with several results: made where all that are read are, at the same positions."""
    parts = [u for u in node.users if u in found.made]
    out: dict[int, Layout] = {int(str(u.args[1])): found.made[u].inputs[node] for u in parts}
    same = len(parts) == len(node.users) and len({found.picks[u] for u in parts}) == 1
    made = at_picks(node, out, found.picks[parts[0]], found.batch) if same else None
    if made is not None:
        found.made[node], found.picks[node] = made, found.picks[parts[0]]
        return
    for user in parts:
        del found.made[user]


def _read(node: Node, found: Reads) -> tuple[Layout, Picks] | None:
    """The layout and the positions that all consumers of a value read, or None where one of them reads more."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    layouts: list[Layout] = []
    picks: Picks | None = None
    for user in node.users:
        made = found.made.get(user)
        if made is not None and node in made.inputs:
            layout, own = made.inputs[node], found.picks[user]
        elif made is None and (picked := picks_of(user, node)) is not None:
            shape = shape_of(node)
            over = (Tokens((Prunable(int(shape[picked.dim])),)),)
            layout = tuple(over if d == picked.dim else plain(s, found.batch) for d, s in enumerate(shape))
            own = picked.picks
        else:
            return None
        layouts.append(layout)
        together = own if picks is None else _union(picks, own)
        if together is None or layout != layouts[0]:
            return None
        picks = together
    if picks is None or picks.count == 0:
        return None
    tokens = next(t for dim in layouts[0] if (t := tokens_in(dim)))
    return (layouts[0], picks) if 2 * picks.count <= tokens.dense else None


def _union(a: Picks | None, b: Picks | None) -> Picks | None:
    """Both, or None where each sample reads its own and they are not the same."""
    if a is None or b is None or a == b:
        return a if a == b else None
    return Picks.at((*a.fixed, *b.fixed)) if a.index is b.index is None else None


def picks_of(user: Node, value: Node) -> Picked | None:
    """What an op reads of a value, where that is some positions of one dimension."""
    if user.op != "call_function" or not user.args or user.args[0] is not value:
        return None
    target, shape = user.target, shape_of(value)
    if target in _APART:
        return _apart(user, shape)
    if target is aten.index.Tensor:
        return _indexed(user, shape)
    if target not in (aten.select.int, aten.slice.Tensor, aten.narrow.default, aten.gather.default):
        return None
    dim = wrap(argument(user, "dim"), len(shape))
    size = shape[dim]
    if not isinstance(size, int):
        return None
    if target is aten.gather.default:
        return _gathered(user, dim, shape)
    if target is aten.select.int:
        at = argument(user, "index")
        return Picked(dim, Picks.at([wrap(at, size)]), True) if isinstance(at, int) else None
    start = argument(user, "start") or 0
    step = argument(user, "step") if target is aten.slice.Tensor else 1
    left = shape_of(user)[dim]
    if not all(isinstance(n, int) for n in (start, step, left)):
        return None
    start = max(0, min(wrap(start, size), size))
    return Picked(dim, Picks.at(range(start, start + left * step, step)))


def parts_of(node: Node) -> dict[Node, Picked] | None:
    """What each result of an op that takes a dimension apart holds; None for other ops."""
    if node.target not in _APART:
        return None
    dim = _dim_apart(node)
    dropped = node.target is aten.unbind.int
    sizes = [1 if dropped else part.shape[dim] for part in node.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    found = {}
    for user in node.users:
        if user.target is not operator.getitem:
            return None
        at = int(str(user.args[1]))
        start = sum(sizes[:at])
        found[user] = Picked(dim, Picks.at(range(start, start + sizes[at])), dropped)
    return found


def _dim_apart(node: Node) -> int:
    value: Any = node.args[0]
    return wrap(argument(node, "dim"), len(shape_of(value)))


def _apart(node: Node, shape: tuple[Any, ...]) -> Picked | None:
    """Results that are read of an op that takes a dimension apart, as one."""
    parts = parts_of(node)
    dim = _dim_apart(node)
    if parts is None or not isinstance(shape[dim], int):
        return None
    return Picked(dim, Picks.at(p for part in parts.values() for p in part.picks.fixed))


def _indexed(node: Node, shape: tuple[Any, ...]) -> Picked | None:
    """`x[torch.arange(len(x)), index]`: each sample's own position."""
    given: Any = node.args[1]
    if len(given) < 2 or any(i is not None for i in given[2:]) or not all(isinstance(i, Node) for i in given[:2]):
        return None
    rows, index = given[:2]
    own = isinstance(shape[1], int) and len(shape_of(index)) == 1 and index.meta["val"].dtype in _INTEGERS
    return Picked(1, Picks((), index, 1), True) if own and _counts(rows, shape[0]) else None


def _counts(node: Node, size: Any) -> bool:
    """Whether a value is 0, 1, 2, ... up to a size."""
    while getattr(node.target, "overloadpacket", None) in _CASTS and isinstance(node.args[0], Node):
        node = node.args[0]
    if getattr(node.target, "overloadpacket", None) is not aten.arange or len(shape_of(node)) != 1:
        return False
    start, _, *step = node.args if len(node.args) > 1 else (0, *node.args)
    one_by_one = start == 0 and step in ([], [1]) and node.meta["val"].dtype in _INTEGERS
    return bool(one_by_one and expr(shape_of(node)[0]) == expr(size))


def _gathered(node: Node, dim: int, shape: tuple[Any, ...]) -> Picked | None:
    """`x.gather(1, index[:, :, None].expand(-1, -1, C))`: each sample's own positions, whole tokens of them."""
    spread, out = argument(node, "index"), shape_of(node)
    if dim != 1 or not isinstance(out[1], int) or len(out) != len(shape):
        return None
    if spread.target is not aten.expand.default or any(
        expr(a) != expr(b) for a, b in zip(out[2:], shape[2:], strict=True)
    ):
        return None
    index = spread.args[0]
    own = shape_of(index)
    whole = len(own) == len(out) and all(expr(s) == 1 for s in own[2:]) and expr(own[1]) == expr(out[1])
    return Picked(1, Picks((), index, out[1])) if whole and expr(own[0]) == expr(out[0]) == expr(shape[0]) else None
