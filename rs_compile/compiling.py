"""From rewritten graphs to what runs: `torch.compile`, and the choice of a guard."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from passes.graph.base import PassResult, Skip
from passes.pipeline import Progress
from passes.sites.outcome import Compiled
from passes.sites.restore import KEPT, TokenOutput
from rs_compile.guard import Guard, Run, Side, Verdict, all_kept, measure
from rs_compile.inductor import compile_graph
from rs_compile.report import BlockRow, Report, StageRow, kernel_cells
from rs_compile.schedule import Schedule

Backend = str | Callable[..., Any]
TokenOutputs = Literal["restore", "compact"]


@dataclass(frozen=True)
class Options:
    """How to rewrite and compile; see `optimize`.

    Args:
        force_insert: insert selections even where every token stays (for tests).
        explicit_attention: write out every attention as softmax(QK^T)V, as published baselines run; without it
            that is done only where a score reads the attention map.
    """

    schedule: Schedule
    backend: Backend = "inductor"
    mode: str | None = None
    options: Mapping[str, Any] | None = None
    token_outputs: TokenOutputs = "restore"
    lower_attention: bool | None = None
    progress: Progress | None = None
    force_insert: bool = False
    explicit_attention: bool = False
    guard: Guard | None = None
    verify: bool = True
    constant_inputs: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    drop_unread: bool | None = None
    outputs: tuple[str | int, ...] | None = None
    debug: str = ""


@dataclass(frozen=True)
class Rewritten:
    """A graph and what is to be said about it; nothing of the graphs that it was made from."""

    gm: GraphModule
    report: Report


def reported(model: str, skips: tuple[Skip, ...], c: Compiled, inputs: str, merging: str = "") -> Rewritten:
    """What is kept of a rewrite: its graph, and the report in place of the graphs on the way.

    Args:
        model: its name.
        skips: of the clean-up.
        inputs: in words.
        merging: how tokens merged, in words.
    """
    rows = tuple(
        BlockRow(b.block.index, b.where, b.tokens_in, b.tokens_out, b.macs_dense, b.macs, *cells, b.sequences)
        for b in c.blocks
        for cells in [kernel_cells(b.kernel)]
    )
    stages = tuple(StageRow(r.stage.index, r.where, r.grid_in, r.grid_out, r.macs_dense, r.macs) for r in c.stages)
    costs = c.dense.macs, c.cost.macs, c.dense.flops, c.cost.flops
    return Rewritten(c.gm, Report(model, inputs, rows, *costs, skips + c.skips, stages, merging, unread_flops=c.unread))


@dataclass(frozen=True)
class Graphs:
    """What one input signature was rewritten to, before `torch.compile`.

    Args:
        pruned: the rewritten graph.
        dense: the graph before anything left it, where a guard compares the two.
        out_spec: how the model nests its outputs.
        fixed_batch: whether they are right for the example's number of samples only.
        unmeasured: why the guard times nothing, "" where it does.
    """

    pruned: Rewritten
    dense: Rewritten | None
    out_spec: pytree.TreeSpec
    fixed_batch: bool
    unmeasured: str = ""

    @property
    def kept(self) -> list[int]:
        """Which outputs are short, with their kept positions behind all outputs."""
        return sorted(KEPT.get(self.pruned.gm) or {})


@dataclass
class Program:
    """What one input signature, and with a guard one size, was compiled to."""

    graphs: Graphs
    made: Rewritten
    run: Run
    verdict: Verdict | None = None


def make_program(graphs: Graphs, options: Options, leaves: Sequence[Any]) -> Program:
    """Compiles for inputs like these; where there is a dense graph, times both and keeps the faster.

    Args:
        leaves: the flat inputs of the call at hand.
    """
    sides = {"pruned": graphs.pruned} | ({"dense": graphs.dense} if graphs.dense is not None else {})
    if options.progress is not None and options.backend != "eager":
        options.progress("compiling" if len(sides) == 1 else "compiling and timing the dense and the pruned graph")
    runs = {side: _run(r.gm, options) for side, r in sides.items()}
    verdict = None
    if options.guard is not None:
        verdict = Verdict("pruned", reason=graphs.unmeasured)
    if len(sides) == 2:
        verdict = measure(runs["dense"], runs["pruned"], leaves)
    kept: Side = verdict.kept if verdict is not None else "pruned"
    run = runs[kept]
    if kept == "dense" and graphs.kept:
        run = all_kept(run, runs["pruned"], leaves, graphs.kept)
    return Program(graphs, sides[kept], run, verdict)


def _run(gm: GraphModule, options: Options) -> Run:
    if options.backend == "eager":
        return gm
    return compile_graph(gm, options.backend, options.mode, options.options)


def nested(graphs: Graphs, outputs: Any) -> Any:
    """The flat outputs as the model nests them; short token outputs with their kept positions."""
    count = graphs.out_spec.num_leaves
    leaves = list(outputs[:count])
    for i, positions in zip(graphs.kept, outputs[count:], strict=True):
        leaves[i] = TokenOutput(leaves[i], positions)
    return pytree.tree_unflatten(leaves, graphs.out_spec)


def copied(prepared: PassResult) -> PassResult:
    """The same with a graph of its own, on the same parameters: passes write into the graph."""
    gm = torch.fx.GraphModule(prepared.gm, copy.deepcopy(prepared.gm.graph))
    gm.meta = dict(prepared.gm.meta)
    return PassResult(gm, skips=prepared.skips)
