"""Values at some of their positions alone, in a graph: picked where they are whole, else made anew from such values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.axes.backward import Made
from passes.axes.gather import take
from passes.axes.reads import Picks
from passes.axes.rules import Extent, Position
from passes.graph.base import CompileError
from passes.graph.codes import Code
from passes.graph.fake import evaluate
from passes.graph.layout import Batch, Dim, Layout, Size, Tokens, dim_size, expr, factor_size, tokens_in
from passes.graph.splice import REPLACED, fake, fake_mode, splice

aten = torch.ops.aten
ORIGIN = "unread"  # of new nodes


class AtPositions:
    """Emits the values of a graph at the positions that are read.

    Args:
        gm: the graph.
        made: ops that run on these positions alone.
        picks: of each of them.
    """

    def __init__(self, gm: GraphModule, made: Mapping[Node, Made], picks: Mapping[Node, Picks]) -> None:
        self.gm, self.graph, self.made, self.picks = gm, gm.graph, made, picks
        self.mode = fake_mode(gm.graph)
        self.twins: dict[Node, Node] = {}
        self._taken: dict[Any, Node] = {}
        self._indices: dict[Node, Node] = {}
        self._anchors: dict[Node, Node] = {}  # the op behind each index, before anything was written there

    def emit(self) -> None:
        """A twin of every op in `made`, in their order. Nothing reads the twins yet.

        Raises:
            CompileError: a twin does not run, or gives another shape than the rules say.
        """
        for node in sorted(self.made):
            before = self._behind(node, self.picks[node])
            try:
                with self.graph.inserting_before(before):
                    self.twins[node] = self._twin(node)
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                raise CompileError(
                    f"{node.name} does not run on the positions that are read: {error}", code=Code.FAULT
                ) from error

    def note(self) -> None:
        """Notes which op stands in whose place, once the twins are read."""
        for node, twin in self.twins.items():
            REPLACED.first(self.gm, {}).setdefault(node, []).append(twin)

    def value(self, node: Node, layout: Layout, picks: Picks) -> Node:
        """A value at these positions, at the graph's insertion point.

        Args:
            node: the whole value.
            layout: what it broadcasts to.
            picks: positions along the dimension that runs over `Tokens`.
        """
        if node in self.twins:
            own = self.picks[node]
            return (
                self.twins[node] if own == picks else self._take(self.twins[node], layout, picks.among(own), own.count)
            )
        return self._take(node, layout, picks)

    def _take(self, node: Node, layout: Layout, picks: Picks, count: int | None = None) -> Node:
        key = (node, layout, picks)
        if key in self._taken:
            return self._taken[key]
        if picks.index is None:
            self._taken[key] = splice(self.graph, ORIGIN, lambda x: at(x, layout, picks.fixed, count), node)
            return self._taken[key]
        shape, tokens = node.meta["val"].shape, next(t for dim in layout if (t := tokens_in(dim)))
        start = len(layout) - len(shape)
        over = [d for d, dim in enumerate(layout) if tokens_in(dim) and d >= start and expr(shape[d - start]) != 1]
        self._taken[key] = splice(
            self.graph,
            ORIGIN,
            lambda x, i: take(x, layout, over, {tokens.pieces: i}),
            node,
            self._index(picks.index, tokens),
        )
        return self._taken[key]

    def _index(self, index: Node, tokens: Tokens) -> Node:
        """[B, K] int64; a negative position counts from the end."""
        if index not in self._indices:

            def whole(i: Tensor) -> Tensor:
                i = i.reshape(i.shape[0], -1).long()
                return torch.where(i < 0, i + tokens.dense, i)

            self._indices[index] = splice(self.graph, ORIGIN, whole, index)
        return self._indices[index]

    def _behind(self, node: Node, picks: Picks) -> Node:
        """Where to write an op that reads these positions: not before they are known."""
        if picks.index is None or picks.index < node:
            return node
        return self._anchors.setdefault(picks.index, picks.index.next)

    def _twin(self, node: Node) -> Node:
        made, picks = self.made[node], self.picks[node]
        t = made.transfer
        swapped = {n: self.value(n, t.aligned.get(n, layout), picks) for n, layout in made.inputs.items()}
        given = (node.args if t.args is None else t.args, node.kwargs if t.kwargs is None else dict(t.kwargs))
        target: Any = t.target or node.target
        args, kwargs = _argument(given, swapped, picks.count)
        if target is aten.expand.default:
            args = (args[0], _expanded(node, args[1]))
        twin = self.graph.call_function(target, args, kwargs)
        twin.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack", "torch_fn")}
        twin.meta["val"] = evaluate(self.mode, target, fake(args), fake(kwargs))
        val, out = twin.meta["val"], t.out
        for one, layout in zip(*((val, out) if isinstance(val, (tuple, list)) else ((val,), (out,))), strict=True):
            promised: list[Size] = [_extent(dim, picks.count) for dim in layout or ()]
            if [p - expr(s) for p, s in zip(promised, one.shape, strict=True)] != [0] * len(promised):
                raise CompileError(
                    f"{node.name} gives {tuple(one.shape)} on the positions that are read, not {promised}",
                    code=Code.FAULT,
                )
        return twin


def at(x: Tensor, layout: Layout, positions: Sequence[int], count: int | None = None) -> Tensor:
    """Some positions of a value along the dimension that runs over `Tokens`, the same for every sample.

    Args:
        x: broadcasts to `layout`.
        layout: has one `Tokens` factor in a dimension.
        positions: ascending.
        count: how many positions x has, where that is not what `layout` says.
    """
    layout = layout[len(layout) - x.dim() :]
    for d, dim in enumerate(layout):
        tokens = tokens_in(dim)
        if tokens is None or (isinstance(x.shape[d], int) and x.shape[d] == 1):
            continue
        i = dim.index(tokens)
        sizes = [_number(dim[:i]), tokens.dense if count is None else count, _number(dim[i + 1 :])]
        whole = x if len(dim) == 1 else x.unflatten(d, sizes)
        along = d if len(dim) == 1 else d + 1
        runs = [whole.narrow(along, start, length) for start, length in _runs(positions)]
        whole = runs[0] if len(runs) == 1 else torch.cat(runs, along)
        x = whole if len(dim) == 1 else whole.flatten(d, d + 2)
    return x


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive positions, as first and how many."""
    runs: list[tuple[int, int]] = []
    for p in positions:
        if runs and p == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((p, 1))
    return runs


def _number(factors: Dim) -> int:
    """The size of these factors, -1 where it counts samples."""
    return -1 if any(isinstance(f, Batch) and f.size.free_symbols for f in factors) else int(dim_size(factors))


def _extent(dim: Dim, count: int) -> Size:
    size = expr(1)
    for f in dim:
        size *= count if isinstance(f, Tokens) else factor_size(f)
    return size


def _argument(given: Any, swapped: Mapping[Node, Node], count: int) -> Any:
    if isinstance(given, (tuple, list)):
        items = [_argument(a, swapped, count) for a in given]
        return items if isinstance(given, list) else tuple(items)
    if isinstance(given, dict):
        return {k: _argument(a, swapped, count) for k, a in given.items()}
    if isinstance(given, Node):
        return swapped.get(given, given)
    if isinstance(given, Extent):
        size = _extent(given.dim, count)
        return int(size) if size.is_Integer else -1  # the one dimension that counts samples
    if isinstance(given, Position):
        border = given.tokens.border(given.at)
        assert border is not None
        return border[0] + border[1] * count
    return given


def _expanded(node: Node, sizes: Sequence[Any]) -> list[Any]:
    """The sizes of an expansion, in which -1 would leave what is to grow: as the model wrote them."""
    given: Any = node.args[1] if node.target is not aten.expand_as.default else sizes
    return [own if new == -1 else new for own, new in zip(given, sizes, strict=True)]
