"""Stages of a convolutional network, found by dataflow: residual blocks whose sums have one shape.

A sum of two maps [B, C, H, W] is a residual block where both come from one value, one of them by
convolutions and the other directly or by one projection: the shortcut. Consecutive blocks of one shape are a
stage; a strided block, or a downsampling layer that is no block, opens the next. Names are never consulted.

A map may be held in another form, cells in one dimension [B, N, C] or channels last. There a stage's blocks are the
sums of such values, one of them with a convolution that slides over the map at least, and what leaves the stage is
the map [B, C, H, W] that the last one is viewed as, after a norm of each cell, say.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch.fx import GraphModule, Node

from passes.axes.grid import Grid, GridAxes, follow_grid, follow_maps
from passes.graph.base import source_line
from passes.graph.layout import expr
from passes.graph.ops import CONV, CONV2D, LINEAR, elementwise
from passes.network.branches import ancestors, module_path, positions

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
        form: where the sum and the shortcut hold rows and columns.
        size: how many.
        slides: a convolution on the way slides over them.
    """

    entry: Node
    shortcut: Node
    add: Node
    output: Node
    nodes: frozenset[Node] = field(repr=False)
    form: Grid
    size: tuple[int, int]
    slides: bool

    @property
    def map(self) -> tuple[int, ...]:
        """Channels, rows, columns."""
        return int(self.add.meta["val"].shape[_channels(self.form)]), *self.size


@dataclass(frozen=True)
class Stage:
    """Residual blocks at one resolution, in order.

    Args:
        index: 0-based.
        blocks: at least one.
        output: the map that leaves the stage, [B, C, H, W].
        nodes: everything from the stage before (from the entry of the first block) to the output.
    """

    index: int
    blocks: tuple[ConvBlock, ...]
    output: Node
    nodes: frozenset[Node] = field(repr=False)

    @property
    def sums(self) -> Node:
        """The last block's output, in the form of the blocks."""
        return self.blocks[-1].output

    @property
    def shortcut(self) -> Node:
        """The shortcut path at the stage's own resolution: the first block's."""
        return self.blocks[0].shortcut

    def as_map(self, x: torch.Tensor) -> torch.Tensor:
        """A value in the form of the blocks as [B, C, H, W], a view of it."""
        form = self.blocks[0].form
        at = _channels(form)
        if form.rows == form.columns:
            x = x.unflatten(form.dims[0], self.grid)
            form, at = replace(form, columns=form.dims[0] + 1), at + (at > form.dims[0])
        return x.permute(0, at, *form.dims)

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
        if run and (block is None or (block.map, block.form) != (run[-1].map, run[-1].form)):
            output = _viewed(run[-1]) if any(b.slides for b in run) else None
            if output is not None:
                start = stages[-1].output if stages else run[0].entry
                nodes = _path(start, output, above, bit)
                stages.append(Stage(len(stages), tuple(run), output, nodes - {start}))
            run = []
        if block is not None:
            run.append(block)
    return stages


def _blocks(gm: GraphModule, above: dict[Node, int], bit: dict[Node, int]) -> list[ConvBlock]:
    found: list[ConvBlock] = []
    dominator = _Dominators(above)
    maps = follow_maps(gm)
    for node in gm.graph.nodes:
        entry = dominator.add(node)
        if entry is None or not _is_sum(node):
            continue
        paths = {t: _path(entry, t, above, bit) - {entry} for t in node.args if isinstance(t, Node)}
        weighted = {t: sum(n.target in WEIGHTED for n in nodes) for t, nodes in paths.items()}
        shortcut, term = sorted(weighted, key=lambda t: weighted[t])  # of equals, the first: then it is no block
        if weighted[shortcut] > 1 or weighted[shortcut] == weighted[term]:
            continue
        form = _form(entry, term, node, paths[term], maps)
        if form is None:
            continue
        nodes = paths[term] | paths[shortcut] | {node}
        slides = form == Grid() or any(n.target in CONV2D and n.args[0] in maps.layouts for n in paths[term])
        block = ConvBlock(entry, shortcut, node, _output(node), nodes, form, _size(node, form, maps), slides)
        inside = [b for b in found if b.add in paths[term]]
        if any(b.map == block.map or b.size != block.size for b in inside):
            continue  # a long skip around whole blocks
        found = [b for b in found if b not in inside]  # sums of fewer channels inside a block are part of it
        found.append(block)
    return found


def _size(add: Node, form: Grid, maps: GridAxes) -> tuple[int, int]:
    """Rows and columns of a sum."""
    rows, columns = add.meta["val"].shape[2:] if form == Grid() else maps.size(add)
    return rows, columns


def _channels(form: Grid) -> int:
    """The one dimension of a map that is neither samples nor cells."""
    (at,) = set(range(1, 2 + len(form.dims))) - set(form.dims)
    return at


def _is_sum(node: Node) -> bool:
    if node.target not in (aten.add.Tensor, aten.add_.Tensor) or node.kwargs.get("alpha", 1) != 1:
        return False
    values = [a.meta.get("val") for a in node.args if isinstance(a, Node)]
    maps = [v for v in values if isinstance(v, torch.Tensor) and v.dim() in (3, 4)]
    return len(set(node.args)) == len(maps) == 2 and [*map(expr, maps[0].shape)] == [*map(expr, maps[1].shape)]


def _form(entry: Node, term: Node, add: Node, branch: frozenset[Node], maps: GridAxes) -> Grid | None:
    """Where a sum holds the rows and columns of a map, of which the entry holds as many, in whatever form."""
    if _on_a_grid(entry, term, branch):
        return Grid()
    form = maps.grid(add)
    if (
        form is None
        or maps.size(entry) != maps.size(add)
        or form.dims == (2, 3)
        or None in (form.rows, form.columns)
        or 0 in form.dims
    ):
        return None
    return Grid(form.rows, form.columns) if add.meta["val"].dim() == 2 + len(form.dims) else None


def _viewed(block: ConvBlock) -> Node | None:
    """The map [B, C, H, W] that a block's output is viewed as, cell by cell, before anything else reads it."""
    node, within = block.output, frozenset(block.output.graph.nodes)
    axes = follow_grid(node, block.form, block.size, within)
    while (grid := axes.grid(node)) is not None and (grid.rows, grid.columns) != (2, 3):
        readers = list(node.users)
        if len(readers) != 1 or readers[0] in axes.mixed:
            return None
        node = readers[0]
    if grid is None:
        return None
    return node if node.meta["val"].dim() == 4 else None


def _on_a_grid(entry: Node, term: Node, nodes: frozenset[Node]) -> bool:
    """Whether a convolution of the branch slides over the last two dimensions of the entry."""
    value = entry.meta["val"]
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return False
    axes = follow_grid(entry, within=nodes)
    slides = any(n.target in CONV2D for n in axes.transfers)
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
