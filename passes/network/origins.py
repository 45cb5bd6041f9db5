"""Where each token of a residual stream comes from: the image, or what the model holds (a class token, registers).

Ops that only move entries about (views, joins, picks) run for real on a tensor that numbers the entries of the values
where trails end, so no order of cat, view, permute, stack and repeat needs a case of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import reduce
from math import lcm, prod
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv

from passes.attention.constants import Constants
from passes.axes.rules.pointwise import tensors
from passes.graph.aliasing import Memory, writes
from passes.graph.base import Refusal, op_name
from passes.graph.codes import Code
from passes.graph.contraction import is_alias
from passes.graph.layout import expr
from passes.graph.ops import LINEAR, NORMS, RESHAPES, SDPA, argument, arguments, aten_name, elementwise, shape_of, wrap
from passes.network.branches import ancestors, positions, stream_of

aten = torch.ops.aten
_PADDING = 0.5  # the number of what padding fills: a hole in the image, and no token if nothing else is in it
_SAMPLES = 2  # so many stand for the batch: with one, squeeze() would take its dimension away
_JOINS = {  # some entries of the result are of one input and some of another, or of none
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack", "where", "masked_fill",
    "constant_pad_nd", "pad", "slice_scatter", "select_scatter", "diagonal_scatter", "scatter", "index_put",
    "index_copy", "index_fill", "copy",
}  # fmt: skip
_PICKS = {"slice", "select", "narrow", "index", "index_select", "gather", "take_along_dim", "unbind", "split", "chunk"}
_MOVES = {
    "repeat", "repeat_interleave", "tile", "flip", "roll", "rot90", "pixel_shuffle", "pixel_unshuffle", "im2col",
    "broadcast_to", "channel_shuffle",
}  # fmt: skip
_WHICH = {"index", "indices", "condition", "mask"}  # arguments that say which entries: their values must be known
_REDUCTIONS = {"mean", "sum", "amax", "amin", "linalg_vector_norm", "norm", "var", "std", "logsumexp"}


@dataclass(frozen=True)
class Origin:
    """Where a token comes from: an entry of the value at which its trail ends."""

    node: Node
    at: tuple[int, ...]


def origins(gm: GraphModule, stream: Node, *dims: int) -> list[Origin | None]:
    """For each position along dimensions of a residual stream where its token comes from; None for learned tokens.

    A position that holds a learned token in one of the rows folded into the batch counts as learned.

    Args:
        gm: a captured graph.
        stream: a value of the residual stream, channels last.
        dims: its token dimension, or its rows and columns.

    Raises:
        Refusal: an op mixes learned tokens with others, and what its result stands for is not known.
    """
    return _Trails(gm, stream).along(dims)


class _Trails:
    """Numbers the entries of values: 0 is learned, above it an entry at which a trail ends, below it a lost trail."""

    def __init__(self, gm: GraphModule, stream: Node) -> None:
        self._stream = stream
        self._order, self._above = positions(gm), ancestors(gm)
        self._sums: dict[Node, Node] = {}
        self._constants = Constants(gm)
        self._ends: list[tuple[int, Node]] = []
        self._lost: list[Node] = []
        self._trails: dict[Node, Any] = {}  # a tensor of numbers, or a list of them
        self._image: set[Node] = set()  # values that are made from the image throughout, and not numbered yet
        self._last = 0
        needed = self._needed(stream)
        self._samples = _SAMPLES * _divisor(needed)
        self._written = self._with_writes(gm, needed)
        for node in sorted(needed, key=self._order.__getitem__):
            if isinstance(node.meta.get("val"), Tensor | list | tuple):
                self._follow(node)

    def along(self, dims: tuple[int, ...]) -> list[Origin | None]:
        """The origins at the positions along these dimensions, the last one fastest."""
        rank = len(shape_of(self._stream))
        rows = [d for d in range(rank - 1) if d not in dims]
        numbers = self._numbers(self._stream).permute(*rows, *dims, rank - 1)
        numbers = numbers.flatten(len(rows), -2).reshape(-1, prod(numbers.shape[len(rows) : -1]), numbers.shape[-1])
        found = _any(numbers, (-1,)).squeeze(-1)  # [rows, N]
        if bool((found < 0).any()):
            at = self._lost[-1 - int(found[found < 0].max())]
            raise Refusal(
                f"whether a token is learned (a class token) cannot be followed through {op_name(at)}",
                at,
                "name the tokens that must stay: Schedule(keep, protected=(0,)), or protected=() where none must",
                code=Code.UNKNOWN_ORIGIN,
            )
        learned = (found == 0).any(0) | (found == _PADDING).all(0)
        ends = zip(found.amax(0).tolist(), learned.tolist(), strict=True)
        return [None if held else self._origin(int(n)) for n, held in ends]

    def _origin(self, number: int) -> Origin:
        before, node = next(end for end in reversed(self._ends) if end[0] < number)
        at = torch.unravel_index(torch.tensor(number - before - 1), self._concrete(shape_of(node)))
        return Origin(node, tuple(map(int, at)))

    def _needed(self, stream: Node) -> set[Node]:
        """The values that the stream is made from, past the branches of residual sums."""
        needed: set[Node] = set()
        todo = [stream]
        while todo:
            node = todo.pop()
            if node in needed:
                continue
            needed.add(node)
            if (source := stream_of(node, self._order, self._above)) is not None:
                self._sums[node] = source
                todo.append(source)
            elif self._data(node):
                todo += node.all_input_nodes
        return needed

    def _with_writes(self, gm: GraphModule, needed: set[Node]) -> set[Node]:
        """The values that are written into before the stream; what writes into those that are needed is added."""
        writers = [n for n in gm.graph.nodes if n < self._stream and _in_place(n)]
        memory, written = Memory(gm.graph) if writers else None, set[Node]()
        for node in reversed(writers):
            assert memory is not None
            touched = {m for target in writes(node) for m in memory.members(target)}
            if touched & needed:
                needed |= self._needed(node).union(*map(self._needed, node.all_input_nodes))
                written |= touched
        return written

    def _data(self, node: Node) -> bool:
        """Whether a value is computed from what an input holds."""
        return bool(self._above[node] & 1)

    def _follow(self, node: Node) -> None:
        """Notes the trail of a value, from those of the inputs of its op."""
        owned = node in self._written
        if (source := self._sums.get(node)) is not None:
            if source in self._image:
                self._image.add(node)
            else:
                self._trails[node] = self._numbers(source).clone()
        elif owned and _in_place(node):
            self._trails[node] = self._write(node)
        elif self._data(node) or (owned and node.op == "call_function"):
            made = self._made(node)
            if made is None:
                self._image.add(node)
            else:
                self._trails[node] = made
        if owned and isinstance(node.meta["val"], Tensor):
            self._numbers(node)  # its views, and what writes into it, share these

    def _numbers(self, node: Node) -> Tensor:
        """The numbers of a value's entries."""
        if node not in self._trails:
            shape = self._concrete(shape_of(node))
            numbers = torch.zeros(shape, dtype=torch.float64)  # every op takes doubles
            if node in self._image:
                self._ends.append((self._last, node))
                numbers = torch.arange(self._last + 1, self._last + 1 + prod(shape), dtype=torch.float64).view(shape)
                self._last += prod(shape)
                self._image.remove(node)
            self._trails[node] = numbers
        numbers = self._trails[node]
        assert isinstance(numbers, Tensor)
        return numbers

    def _whole(self, node: Node) -> bool:
        """Whether every entry of a value is made from the image."""
        trail = self._trails.get(node)
        return node in self._image or (isinstance(trail, Tensor) and bool((trail > 0).all()))

    def _made(self, node: Node) -> Any:
        """The trail of an op's result; None where the image made all of it."""
        if node.target is operator.getitem:
            source: Any = node.args[0]
            if source in self._image:
                return None
            return self._trails[source][node.args[1]] if source in self._trails else self._lose(node)
        if not isinstance(node.target, OpOverload):
            return None if all(self._whole(n) for n in node.all_input_nodes if self._data(n)) else self._lose(node)
        name, inputs = aten_name(node), tensors((node.args, node.kwargs))
        if node.target in RESHAPES and node not in self._written and all(map(self._whole, inputs)):
            return None  # a grid, flattened
        joins = name in _JOINS | _PICKS
        if joins and name in ("where", "masked_fill") and not all(map(self._known, inputs)):
            joins = False
        if joins or name in _MOVES or is_alias(node):
            untouched = not joins and {*inputs} <= self._image
            return None if untouched else self._moved(node)
        if elementwise(node.target) and isinstance(node.meta["val"], Tensor):
            return self._together(node, name, inputs)
        if all(self._whole(n) for n in inputs if self._data(n)):
            return None
        found = self._mixed(node, name, [n for n in inputs if self._data(n)])
        return self._lose(node) if found is None else found.expand(self._concrete(shape_of(node)))

    def _known(self, node: Node) -> bool:
        """Whether an argument that says which entries is known; true for any other."""
        return node.meta["val"].dtype != torch.bool or self._constants.value(node) is not None

    def _moved(self, node: Node) -> Any:
        """The op itself, run on numbers."""
        vals, op = node.meta["val"], node.target
        one = isinstance(vals, Tensor)
        made: Any = None
        assert isinstance(op, OpOverload)
        try:
            given = {key: self._operand(key, value) for key, value in arguments(node).items()}
            if aten_name(node) in ("pad", "constant_pad_nd"):
                given["value"] = _PADDING
            made = op(**given)
        except Exception:  # entries picked by what is not known, or a form of the op that does not run on numbers
            pass
        shapes = [self._concrete(v.shape) for v in ([vals] if one else vals)]
        if made is not None and [tuple(t.shape) for t in ([made] if one else made)] == shapes:
            return made
        data = [n for n in tensors(node.args) if n.meta["val"].is_floating_point()]
        return None if data and all(map(self._whole, data)) else self._lose(node)

    def _operand(self, name: str, value: Any) -> Any:
        """An op's argument: numbers in place of values, sizes for the samples that stand for the batch."""
        if name in ("value", "other", "self") and isinstance(value, int | float):
            return 0  # a number that fills a place is no image

        def known(n: Any) -> Any:
            if not isinstance(n, Node):
                return n
            if not isinstance(n.meta["val"], Tensor):
                return self._concrete([n.meta["val"]])[0]
            if name not in _WHICH:
                return self._numbers(n)
            if (which := self._constants.value(n)) is None:
                raise LookupError(n.name)
            return which

        return map_aggregate(value, known)

    def _together(self, node: Node, name: str, inputs: Sequence[Node]) -> Any:
        """An entry of an elementwise op is made from the same entries of the inputs."""
        if name == "mul" and any((by := self._constants.literal(n)) is not None and 0 in by for n in inputs):
            pairs = [(n, self._constants.literal(n)) for n in inputs]  # a constant mask takes entries out
            parts = [self._numbers(n) for n, by in pairs if by is None]
            return reduce(torch.mul, [(by != 0).double() for _, by in pairs if by is not None], reduce(_either, parts))
        if not self._image.isdisjoint(inputs) and all(
            self._concrete(shape_of(n)) == self._concrete(shape_of(node)) for n in inputs if n in self._image
        ):
            return None
        found = reduce(_either, map(self._numbers, inputs))
        return found.expand(self._concrete(shape_of(node))).clone()

    def _mixed(self, node: Node, name: str, data: Sequence[Node]) -> Tensor | None:
        """Ops that mix channels, or keep the place of each token; None for others."""
        first: Any = node.args[0]
        if node.target is SDPA:  # its result stands where the queries stand
            return _any(self._numbers(first), (-1,))
        if name == "embedding":
            return self._numbers(data[0]).unsqueeze(-1) if data == [node.args[1]] else None
        if data != [first]:
            return None
        numbers, rank = self._numbers(first), len(shape_of(first))
        if node.target in NORMS:
            return _any(numbers, tuple(range(-len(argument(node, "normalized_shape")), 0)))
        if name in ("conv1d", "conv2d", "conv3d"):
            kernel = shape_of(node.args[1])[2:]
            return _any(numbers, (1,)) if {*kernel} == {1} and shape_of(node)[2:] == shape_of(first)[2:] else None
        if node.target in LINEAR or name == "glu" or (name == "matmul" and len(shape_of(node.args[1])) > 1):
            over = argument(node, "dim") if name == "glu" else -1
            return _any(numbers, (-1,)) if over in (-1, rank - 1) else None
        if name in ("softmax", "log_softmax"):
            return _any(numbers, (argument(node, "dim"),))
        if name == "batch_norm":
            return numbers
        if name in _REDUCTIONS:
            given = arguments(node)
            dims = given["dim"] if isinstance(given["dim"], list | tuple) else [given["dim"]]
            over_all = tuple(range(rank)) if dims in ([], [None]) else tuple(wrap(d, rank) for d in dims)
            found = _any(numbers, over_all)
            return found if given["keepdim"] else found.squeeze(over_all)
        return None

    def _write(self, node: Node) -> Tensor:
        """An op that writes in place, on numbers: views of them share memory as the values do."""
        name, inputs = aten_name(node), tensors((node.args, node.kwargs))
        target = self._numbers(inputs[0])
        assert isinstance(node.target, OpOverload)
        if name in ("fill", "zero") or (name == "copy" and len(inputs) == 2):
            target.copy_(self._numbers(inputs[1]) if len(inputs) == 2 else torch.zeros(()))
        elif torch.Tag.pointwise in node.target.tags and name not in ("where", "masked_fill"):
            target.copy_(reduce(_either, map(self._numbers, inputs)))
        else:
            target.copy_(self._lose(node).expand_as(target))
        return target

    def _concrete(self, sizes: Sequence[Any]) -> tuple[int, ...]:
        """Sizes with a number of samples for the batch."""
        found = [expr(size) for size in sizes]
        return tuple(int(e.subs(dict.fromkeys(e.free_symbols, self._samples))) for e in found)

    def _lose(self, node: Node) -> Any:
        """Numbers that say at which op the trail was lost."""
        self._lost.append(node)
        vals = node.meta["val"]
        made = [
            torch.full(self._concrete(v.shape), -float(len(self._lost)), dtype=torch.float64)
            for v in ([vals] if isinstance(vals, Tensor) else vals)
        ]
        return made[0] if isinstance(vals, Tensor) else made


def _in_place(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable and bool(writes(node))


def _divisor(nodes: Collection[Node]) -> int:
    """What the batch is divided by (the frames of a clip), so that every size is a whole number."""
    vals = [v for n in nodes for v in pytree.tree_leaves(n.meta.get("val"))]
    sizes = {expr(s) for v in vals for s in (v.shape if isinstance(v, Tensor) else (v,)) if isinstance(s, SymInt)}
    parts = {part.args[1] for size in sizes for part in size.atoms(FloorDiv)}
    return lcm(*(int(part) for part in parts if part.is_Integer))


def _either(a: Tensor, b: Tensor) -> Tensor:
    """Entries made from both: an end of a trail first, then a lost one."""
    most = torch.maximum(a, b)
    return torch.where(a >= 1, a, torch.where(most > 0, most, torch.minimum(a, b)))


def _any(numbers: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The same along dimensions, which are kept."""
    most = numbers.amax(dims, keepdim=True)
    return torch.where(most > 0, most, numbers.amin(dims, keepdim=True))
