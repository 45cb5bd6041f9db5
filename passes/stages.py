"""Stages of a convolutional network, found by dataflow: residual blocks whose sums have one shape.

A sum of two maps [B, C, H, W] is a residual block where both come from one value, one of them by
convolutions and the other directly or by one projection: the shortcut. Consecutive blocks of one shape are a
stage; a strided block, or a downsampling layer that is no block, opens the next. Names are never consulted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from passes.base import source_line
from passes.branches import CONV, LINEAR, ancestors, module_path, positions
from passes.grid_axes import follow_grid
from passes.layout import expr
from passes.rules.pointwise import elementwise

aten = torch.ops.aten
WEIGHTED = CONV | LINEAR


@dataclass(frozen=True)
class ConvBlock:
    """A residual block: `add = term + shortcut`, both computed from `entry`.

    Args:
        entry: the value that both paths start from.
        shortcut: what the branch is added to, [B, C, H, W]: the entry itself or its projection.
        add: the sum.
        output: the sum after the activations that are its only readers.
        nodes: what lies on either path, the sum included.
    """

    entry: Node
    shortcut: Node
    add: Node
    output: Node
    nodes: frozenset[Node] = field(repr=False)


@dataclass(frozen=True)
class Stage:
    """Residual blocks at one resolution, in order.

    Args:
        index: 0-based.
        blocks: at least one.
        nodes: everything from the stage before (from the entry of the first block) to the output.
    """

    index: int
    blocks: tuple[ConvBlock, ...]
    nodes: frozenset[Node] = field(repr=False)

    @property
    def output(self) -> Node:
        """The map that leaves the stage, [B, C, H, W]."""
        return self.blocks[-1].output

    @property
    def shortcut(self) -> Node:
        """The shortcut path at the stage's own resolution: the first block's."""
        return self.blocks[0].shortcut

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the output, as the graph stands."""
        return tuple(self.output.meta["val"].shape[2:])

    @property
    def where(self) -> str:
        """The path of the module that holds all its blocks, or the line of the last one's sum."""
        paths = [module_path(b.add).split(".") for b in self.blocks]
        shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
        return ".".join(names[0] for names in shared) or source_line(self.output)


@dataclass(frozen=True)
class StageReport:
    """What became of a stage: its map, rows x columns, before and after the cut; MACs of one sample."""

    stage: Stage
    where: str
    channels: int
    grid_in: tuple[int, int]
    grid_out: tuple[int, int]
    macs_dense: int
    macs: int


def find_stages(gm: GraphModule) -> list[Stage]:
    """The stages in topological order."""
    above, bit = ancestors(gm), positions(gm)
    stages: list[Stage] = []
    run: list[ConvBlock] = []
    for block in [*_blocks(gm, above, bit), None]:
        if run and block is not None and not above[block.add] >> bit[run[-1].output] & 1:
            continue  # beside the path that the stages are on
        if run and (block is None or _map(block.add) != _map(run[-1].add)):
            start = stages[-1].output if stages else run[0].entry
            nodes = _path(start, run[-1].output, above, bit)
            stages.append(Stage(len(stages), tuple(run), nodes - {start}))
            run = []
        if block is not None:
            run.append(block)
    return stages


def _blocks(gm: GraphModule, above: dict[Node, int], bit: dict[Node, int]) -> list[ConvBlock]:
    found: list[ConvBlock] = []
    dominator = _Dominators(above)
    for node in gm.graph.nodes:
        entry = dominator.add(node)
        if entry is None or not _is_sum_of_maps(node):
            continue
        paths = {t: _path(entry, t, above, bit) - {entry} for t in node.args if isinstance(t, Node)}
        weighted = {t: sum(n.target in WEIGHTED for n in nodes) for t, nodes in paths.items()}
        shortcut, term = sorted(weighted, key=lambda t: weighted[t])  # of equals, the first: then it is no block
        if weighted[shortcut] > 1 or weighted[shortcut] == weighted[term] or not _on_a_grid(entry, term, paths[term]):
            continue
        inside = [b for b in found if b.add in paths[term]]
        if any(_map(b.add) == _map(node) or _map(b.add)[1:] != _map(node)[1:] for b in inside):
            continue  # a long skip around whole blocks
        found = [b for b in found if b not in inside]  # sums of fewer channels inside a block are part of it
        nodes = paths[term] | paths[shortcut] | {node}
        found.append(ConvBlock(entry, shortcut, node, _output(node), nodes))
    return found


def _map(node: Node) -> tuple[int, ...]:
    """Channels, rows, columns."""
    return tuple(node.meta["val"].shape[1:])


def _is_sum_of_maps(node: Node) -> bool:
    if node.target not in (aten.add.Tensor, aten.add_.Tensor) or node.kwargs.get("alpha", 1) != 1:
        return False
    values = [a.meta.get("val") for a in node.args if isinstance(a, Node)]
    maps = [v for v in values if isinstance(v, torch.Tensor) and v.dim() == 4]
    return len(set(node.args)) == len(maps) == 2 and [*map(expr, maps[0].shape)] == [*map(expr, maps[1].shape)]


def _on_a_grid(entry: Node, term: Node, nodes: frozenset[Node]) -> bool:
    """Whether a convolution of the branch slides over the last two dimensions of the entry."""
    value = entry.meta["val"]
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return False
    axes = follow_grid(entry, within=nodes)
    slides = any(n.target is aten.conv2d.default or n.target is aten.conv2d.padding for n in axes.follows)
    grid = axes.grid(term)
    return slides and (grid is None or grid.dims == (2, 3))


def _output(add: Node) -> Node:
    """The sum after the elementwise ops that are its only readers: in a ResNet its ReLU."""
    node = add
    while len(node.users) == 1:
        (user,) = node.users
        if not elementwise(user.target) or user.all_input_nodes != [node]:
            break
        node = user
    return node


def _path(start: Node, end: Node, above: dict[Node, int], bit: dict[Node, int]) -> frozenset[Node]:
    """The nodes on a path from start to end, both included."""
    mine = above[end] | 1 << bit[end]
    from_start = 1 << bit[start]
    return frozenset(
        n for n in _between(start, end) if n in (start, end) or (above[n] & from_start and mine >> bit[n] & 1)
    )


def _between(start: Node, end: Node) -> Iterator[Node]:
    node = start
    while True:
        yield node
        if node is end:
            return
        node = node.next
        if node.op == "root":
            return


class _Dominators:
    """For each value the nearest other one that every path from the inputs to it goes through."""

    def __init__(self, above: dict[Node, int]) -> None:
        self.above = above
        self.parent: dict[Node, Node | None] = {}
        self.depth: dict[Node, int] = {}

    def add(self, node: Node) -> Node | None:
        """Takes the next node in topological order; None where only the inputs themselves are common."""
        if not self.above[node] & 1 or node.op == "placeholder":
            self.parent[node], self.depth[node] = None, 0
            return None
        read = [n for n in node.all_input_nodes if n.op == "placeholder" or self.above[n] & 1]
        common: Node | None = read[0]
        for n in read[1:]:
            common = self._meet(common, n)
        self.parent[node] = common
        self.depth[node] = 0 if common is None else self.depth[common] + 1
        return common

    def _meet(self, a: Node | None, b: Node | None) -> Node | None:
        while a is not b:
            if a is None or b is None:
                return None
            if self.depth[a] < self.depth[b]:
                a, b = b, a
            a = self.parent[a]
        return a
