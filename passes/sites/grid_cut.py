"""Takes rows and columns out of a stage's output; everything behind it runs on the smaller grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from passes.axes.grid import RESTORE, WAY_OUT, GridAxes, follow_grid
from passes.axes.rules import Extent, Transfer
from passes.graph.base import CompileError, Pass, PassResult, Refusal
from passes.graph.codes import Code
from passes.graph.facts import Fact
from passes.graph.fake import evaluate
from passes.graph.layout import Dim, Line, factor_size, lines_in
from passes.graph.splice import fake, fake_mode, splice, splice_all
from passes.network.stages import Stage
from passes.sites.grid_prune import GridPrune
from passes.sites.grid_select import kept_cells, kept_lines, score_map, spread, take
from passes.sites.importance import Lowest, Random, Score, Shift
from passes.sites.select import MANY

# of graphs: by stage the rows and columns kept, which broadcast to [B, H', W']
# of graphs: by stage the rows and columns kept, which broadcast to [B, H', W']
CUTS: Fact[dict[int, tuple[Node, Node]]] = Fact("cuts")
MAPS: Fact[dict[int, tuple[Node, Node]]] = Fact("maps")  # of graphs: by stage the map before the cut and after it


@dataclass(frozen=True)
class CutGrid(Pass):
    """Score, selection and gather after a stage; then the ops behind it, one by one, on the smaller grid.

    Outputs of the model keep their size: the stage's own output as it was, an output that every cell is
    computed for by itself from the whole map, any other by the nearest cell that is left (`spread`).

    Args:
        stage: after which; its nodes must be in the graph.
        cut: how much leaves, and how.
        score: the shift, whose metric counts; `Random` or the `Lowest` of either are baselines.
        compact_outputs: the caller wants short outputs, which a map has no form for.
    """

    stage: Stage
    cut: GridPrune
    score: Score = Shift()
    compact_outputs: bool = False

    def call(self, gm: GraphModule) -> PassResult:
        graph, output = gm.graph, self.stage.output
        self._check()
        axes = follow_grid(output)
        if axes.dense and self.compact_outputs:
            raise Refusal(
                "an output of the model is a map, which has no short form",
                output,
                'use token_outputs="restore"',
                code=Code.OUTPUTS,
            )
        readers = [user for user in output.users if user in axes.transfers]
        whole = _whole(axes)
        with graph.inserting_before(output.next):
            score = self.insert_score(graph)
            select = partial(self._select, many=bool(MANY.get(gm)))
            rows, columns = splice_all(graph, "select", select, score)
            CUTS.first(gm, {})[self.stage.index] = (rows, columns)
            short = splice(graph, "gather", take, output, rows, columns)
        MAPS.first(gm, {})[self.stage.index] = (output, short)
        for reader in readers:
            reader.replace_input_with(output, short)
        cut = _Cut(gm, axes, rows, columns, short)
        for node, transfer in axes.transfers.items():
            cut.follow(node, transfer)
        for consumer in axes.dense:
            for value in [n for n in consumer.all_input_nodes if n in axes.layouts]:
                consumer.replace_input_with(value, whole[value] if value in whole else cut.restored(value))
        return PassResult(gm, rewrites=1)

    def _check(self) -> None:
        height, width = self.stage.grid
        for name, left, there in (("rows", self.cut.rows, height), ("columns", self.cut.columns, width)):
            if left >= there:
                raise CompileError(
                    f"{left} {name} are to leave stage {self.stage.index}, which has {there} {name}; "
                    f"write {name} from 0 to {there - 1}",
                    code=Code.TOO_MANY,
                )

    def insert_score(self, graph: torch.fx.Graph) -> Node:
        """The score map [B, H, W] of the stage, at the graph's insertion point."""
        output, blocks = self.stage.output, self.stage.blocks
        sums, shape = self.stage.sums, self.stage.as_map
        by = self.score.score if isinstance(self.score, Lowest) else self.score
        against, metric = self.cut.against, by.metric if isinstance(by, Shift) else "l2"

        def score(*values: Tensor) -> Tensor:
            maps = [shape(v) for v in values]
            return score_map(list(zip(maps[::2], maps[1::2], strict=True)), metric)

        if isinstance(by, Random):
            return splice(graph, "score", lambda x: torch.rand_like(x[:, 0], dtype=torch.float32), output)
        if against == "shortcut":
            return splice(graph, "score", score, sums, self.stage.shortcut)
        if against == "sum":
            return splice(graph, "score", score, *[n for b in blocks for n in (b.output, b.shortcut)])
        if len(blocks) == 1:
            raise Refusal(
                f"stage {self.stage.index} has one block, whose output is the stage's",
                output,
                'use GridPrune(against="shortcut")',
                code=Code.NO_SCORE,
            )
        return splice(graph, "score", score, sums, blocks[0].output)

    def _select(self, score: Tensor, many: bool) -> tuple[Tensor, Tensor]:
        height, width = self.stage.grid
        cut, lowest = self.cut, self.score.lowest
        rows, columns = height - cut.rows, width - cut.columns
        if cut.mode == "line":
            return kept_lines(score, rows, columns, cut.order == "rows-first", lowest, many)
        return kept_cells(score, rows, columns, lowest)


def _whole(axes: GridAxes) -> dict[Node, Node]:
    """For each value that an output reads and that needs no other cell of the map: the same from the whole map."""
    whole = {axes.start: axes.start}

    def copied(value: Node) -> Node:
        if value not in whole:
            inputs = {n: copied(n) for n in value.all_input_nodes if n in axes.layouts}
            with value.graph.inserting_before(value):
                whole[value] = value.graph.node_copy(value, lambda n: inputs.get(n, n))
        return whole[value]

    for consumer in axes.dense:
        for value in consumer.all_input_nodes:
            if axes.lines(value) and value not in axes.mixed:
                copied(value)
    return whole


class _Cut:
    """Moves the ops behind a cut onto the smaller grid, in topological order."""

    def __init__(self, gm: GraphModule, axes: GridAxes, rows: Node, columns: Node, short: Node) -> None:
        self.graph = gm.graph
        self.axes = axes
        self.rows = rows
        self.columns = columns
        self.mode = fake_mode(gm.graph)
        self.full = {n: tuple(n.meta["val"].shape) for n in axes.layouts if axes.lines(n)}
        self.left: dict[Node, dict[int, int]] = {short: dict(enumerate(short.meta["val"].shape[2:]))}
        self.now: dict[Node, Node] = {axes.start: short}
        self.taken: dict[Node, Node] = {}

    def follow(self, node: Node, transfer: Transfer) -> None:
        """Gives the op inputs on the smaller grid and recomputes its value."""
        for n in transfer.aligned:
            if n not in self.taken:
                with self.graph.inserting_before(node):
                    self.taken[n] = splice(self.graph, "gather", take, n, self.rows, self.columns)
            node.replace_input_with(n, self.taken[n])
        if not transfer.apart:
            self._same_cells(node)
        left = next((self.left[n] for n in node.all_input_nodes if n in self.left), {})
        self._rewrite(node, transfer, left)
        before = node.meta["val"]
        try:
            op: Any = node.target
            node.meta["val"] = evaluate(self.mode, op, fake(node.args), fake(node.kwargs))
        except Exception as error:
            raise Refusal(
                f"does not run on the smaller grid: {str(error).splitlines()[0]}", node, WAY_OUT, code=Code.FIXED_GRID
            ) from error
        after, out = node.meta["val"], transfer.out
        if out is not None:
            self.left[node] = left
        if not isinstance(after, torch.Tensor):
            return
        over = [lines_in(cast(Dim, dim)) for dim in out or ((),) * before.dim()]
        same = [a == b for a, b, lines in zip(after.shape, before.shape, over, strict=False) if not lines]
        if after.dim() != before.dim() or not all(same):
            raise Refusal(f"gives {tuple(after.shape)} on the smaller grid", node, WAY_OUT, code=Code.FIXED_GRID)
        alone = {lines[0].at: after.shape[d] for d, lines in enumerate(over) if len(lines) == 1}
        self.left[node] = left | alone
        gone = {f.at: f.count - alone[f.at] for lines in over for f in lines if f.at in alone}
        if any(n % transfer.period[at] for at, n in gone.items()):
            raise Refusal(
                f"pads the map by amounts that may be others on the smaller grid, from which {gone[0]} rows and "
                f"{gone[1]} columns are gone",
                node,
                self.axes.fitting,
                code=Code.FIXED_GRID,
            )

    def _rewrite(self, node: Node, transfer: Transfer, left: Mapping[int, int]) -> None:
        """Writes what a rule gives in the place of the op or its arguments, with the sizes of the smaller map."""
        now = self.now | self.taken

        def fitted(given: Any) -> Any:
            if isinstance(given, Extent):
                return math.prod(left[f.at] if isinstance(f, Line) else int(factor_size(f)) for f in given.dim)
            return now.get(given, given) if isinstance(given, Node) else given

        if transfer.target is not None:
            node.target = transfer.target
        if transfer.args is not None:
            node.args = cast(Any, map_aggregate(transfer.args, fitted))
        if transfer.kwargs is not None:
            node.kwargs = cast(Any, map_aggregate(dict(transfer.kwargs), fitted))

    def _same_cells(self, node: Node) -> None:
        """Maps that meet must be equally large, lest one of a single row be broadcast."""
        start = self.axes.start
        inputs = {n: start if n is self.now[start] else n for n in node.all_input_nodes}
        held = [(n, lines) for n, was in inputs.items() if (lines := self.axes.lines(was))]
        sizes = {tuple(self.left[n][f.at] for f in lines) for n, lines in held}
        if any(len({self.left[n][at] for n, lines in held if at in [f.at for f in lines]}) > 1 for at in (0, 1)):
            raise Refusal(
                f"maps of different sizes meet on the smaller grid: {sorted(sizes)}",
                node,
                f"{self.axes.fitting}, or {WAY_OUT}",
                code=Code.FIXED_GRID,
            )

    def restored(self, value: Node) -> Node:
        """The value at full size, from the nearest cells that are left."""
        grid = self.axes.grid(value)
        if grid is None or (grid.rows, grid.columns) != (2, 3) or len(self.full[value]) != 4:
            raise Refusal(
                "an output is no map [batch, channels, rows, columns] any more", value, WAY_OUT, code=Code.OUTPUTS
            )
        if not self.axes.sample_for_sample(value):
            raise Refusal("an output has other samples than the map that was cut", value, WAY_OUT, code=Code.OUTPUTS)
        start = (float(grid.start[0]), float(grid.start[1]))
        size: Any = self.full[value][2:]
        cut: Any = self.axes.size(self.axes.start)

        def back(x: Tensor, r: Tensor, c: Tensor) -> Tensor:
            return spread(x, r, c, cut, size, grid.step, start)

        with self.graph.inserting_before(value.next):
            return splice(self.graph, RESTORE, back, value, self.rows, self.columns)
