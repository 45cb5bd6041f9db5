"""What the compiler found, rewrote and left alone, as a table to read and as JSON to keep."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from passes.attention.attention_kernel import KernelChoice
from passes.graph.base import Skip
from rs_compile.guard import Verdict

_REASON_WIDTH = 48  # columns; a kernel's reason may be a sentence


@dataclass(frozen=True)
class BlockRow:
    """One block before and after the rewrite.

    Args:
        block: index of the block, 0-based, in the order of the MLP branches.
        where: the block's place in the model.
        tokens_in: tokens that reach the block, prefix tokens included; of each sequence, where a sample has several.
        tokens_out: tokens that leave it.
        macs_dense: multiply-accumulates of one sample, before the rewrite.
        macs: the same after it.
        attention_kernel: the kernel that attention takes on the device at hand, "" without attention.
        kernel_reason: why it is not flash, "" where it is.
        sequences: of so many tokens that a sample has: windows or frames in the batch; schedules count in each.
    """

    block: int
    where: str
    tokens_in: int | None
    tokens_out: int | None
    macs_dense: int
    macs: int
    attention_kernel: str = ""
    kernel_reason: str = ""
    sequences: int = 1


@dataclass(frozen=True)
class StageRow:
    """One stage of a CNN before and after the rewrite.

    Args:
        stage: its index, 0-based.
        where: its place in the model.
        grid_in: rows and columns of the map that the stage makes.
        grid_out: rows and columns of what goes on to the next stage.
        macs_dense: multiply-accumulates of one sample, before the rewrite.
        macs: the same after it.
    """

    stage: int
    where: str
    grid_in: tuple[int, int]
    grid_out: tuple[int, int]
    macs_dense: int
    macs: int


@dataclass(frozen=True)
class Report:
    """What `optimize` made of a model for one input signature. All costs are those of one sample.

    Args:
        model: name of the model's class.
        signature: the inputs' shapes, dtypes and device.
        blocks: a row for each block.
        macs_dense, macs: multiply-accumulates of the whole model, before and after.
        flops_dense, flops: the same in fvcore's convention (`passes.graph.cost`), which papers print.
        skips: where a pass could have fired and did not.
        stages: a row for each stage of a CNN that was rewritten by `Schedule.grid`.
        merging: how tokens merged, and what sizes do behind the merges; "" where none did.
        unread_flops: FLOPs saved by computing nothing for tokens that nobody reads (`optimize(drop_unread=...)`).
        guard: what `guard="measure"` timed and kept; rows and costs are those of the graph that it kept.
    """

    model: str
    signature: str
    blocks: tuple[BlockRow, ...]
    macs_dense: int
    macs: int
    flops_dense: int
    flops: int
    skips: tuple[Skip, ...] = ()
    stages: tuple[StageRow, ...] = ()
    merging: str = ""
    guard: Verdict | None = None
    unread_flops: int = 0

    def __str__(self) -> str:
        gflops = f"GFLOPs (fvcore's convention, one sample): {_giga(self.flops_dense)} -> {_giga(self.flops)}"
        if self.flops:
            gflops += f", a ratio of {self.flops_dense / self.flops:.2f}"
        table = self._stage_table() if self.stages else self._block_table()
        return "\n".join([f"{self.model}, {self.signature}", table, gflops, *self.notes, *_skip_lines(self.skips)])

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the same as a page, one file that needs nothing else.

        Raises:
            CompileError: the file cannot be written.
        """
        from rs_compile.pages import write_page

        write_page(path, "report.html", report=self)

    @property
    def notes(self) -> list[str]:
        """How tokens merged, what unread ones saved, what a guard kept: a line each, where there is one."""
        return [str(note) for note in (self.merging, self._unread(), self.guard) if note]

    @property
    def kernels(self) -> dict[tuple[str, str], list[int]]:
        """By attention kernel, and why it is not flash, the blocks that take it."""
        found: dict[tuple[str, str], list[int]] = {}
        for row in self.blocks:
            if row.attention_kernel:
                found.setdefault((row.attention_kernel, row.kernel_reason), []).append(row.block)
        return found

    @property
    def skipped(self) -> dict[str, list[Skip]]:
        """The skips by reason."""
        return _by_reason(self.skips)

    def _unread(self) -> str:
        if not self.unread_flops:
            return ""
        share = 100 * self.unread_flops / (self.flops + self.unread_flops)
        return f"unread tokens: {_giga(self.unread_flops)} GFLOPs ({share:.1f}%) left out behind the last attention"

    def _stage_table(self) -> str:
        rest = [self.macs_dense, self.macs]
        rows = []
        for row in self.stages:
            rest = [rest[0] - row.macs_dense, rest[1] - row.macs]
            grids = (_grid(row.grid_in), _grid(row.grid_out))
            rows.append((str(row.stage), row.where, *grids, _giga(row.macs_dense), _giga(row.macs)))
        rows.append(("rest", "outside the stages", "", "", _giga(rest[0]), _giga(rest[1])))
        rows.append(("total", "", "", "", _giga(self.macs_dense), _giga(self.macs)))
        return _table(("stage", "where", "rows x columns in", "out", "GMACs dense", "GMACs"), rows, "rlrrrr")

    def _block_table(self) -> str:
        rest_dense = self.macs_dense - sum(row.macs_dense for row in self.blocks)
        rest = self.macs - sum(row.macs for row in self.blocks)
        rows = [
            (
                str(row.block),
                row.where,
                _number(row.tokens_in, row.sequences),
                _number(row.tokens_out, row.sequences),
                _giga(row.macs_dense),
                _giga(row.macs),
                row.attention_kernel or "-",
                row.kernel_reason,
            )
            for row in self.blocks
        ]
        rows.append(("rest", "outside the blocks", "", "", _giga(rest_dense), _giga(rest), "", ""))
        rows.append(("total", "", "", "", _giga(self.macs_dense), _giga(self.macs), "", ""))
        heads = ("block", "where", "tokens in", "out", "GMACs dense", "GMACs", "attention", "why not flash")
        return _table(heads, rows, "rlrrrrll")

    def to_json(self) -> str:
        """The same content as JSON; blocks are a list of objects, the sums stand under "totals"."""
        return _json(
            model=self.model,
            signature=self.signature,
            blocks=[asdict(row) for row in self.blocks],
            stages=[asdict(row) for row in self.stages],
            merging=self.merging,
            guard=asdict(self.guard) if self.guard is not None else None,
            totals={
                "macs_dense": self.macs_dense,
                "macs": self.macs,
                "flops_dense": self.flops_dense,
                "flops": self.flops,
                **({"unread_flops": self.unread_flops} if self.unread_flops else {}),
            },
            skips=[asdict(skip) for skip in self.skips],
        )


@dataclass(frozen=True)
class ExplanationRow:
    """One block as the compiler sees it.

    Args:
        block: its index, as a schedule counts; None for a branch outside any block.
        where: its place in the model.
        kind: the residual branches in it, "attention + mlp".
        tokens: how many tokens it sees, None where there is no token axis.
        attention_kernel: the kernel that its attention takes, "" without attention.
        kernel_reason: why it is not flash, "" where it is.
        prunable: whether tokens can leave after it.
        reason: why not, "" where they can.
        until: where every token is back for the layers behind, "" where that is the end of the network.
        sequences: see `BlockRow`.
    """

    block: int | None
    where: str
    kind: str
    tokens: int | None
    attention_kernel: str
    kernel_reason: str
    prunable: bool
    reason: str = ""
    until: str = ""
    sequences: int = 1


@dataclass(frozen=True)
class StageExplanation:
    """One stage of a CNN as the compiler sees it.

    Args:
        stage: its index, as `Schedule.grid` counts.
        where: its place in the model.
        blocks: residual blocks in it.
        grid: rows and columns of the map that it makes.
        prunable: whether rows and columns can leave after it.
        reason: why not, "" where they can.
    """

    stage: int
    where: str
    blocks: int
    grid: tuple[int, int]
    prunable: bool
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """What `explain` found in a model, before any schedule.

    Args:
        model: name of the model's class.
        rows: a row for each block.
        skips: where a pass could have fired and did not.
        notes: what else a user should know, a sentence each.
        stages: a row for each stage of a CNN.
    """

    model: str
    rows: tuple[ExplanationRow, ...]
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    stages: tuple[StageExplanation, ...] = ()

    def __str__(self) -> str:
        tables = [] if self.stages and not self.rows else [self._block_table()]
        if self.stages:
            heads = ("stage", "where", "blocks", "rows x columns", "prunable", "why not")
            rows = [
                (str(s.stage), s.where, str(s.blocks), _grid(s.grid), "yes" if s.prunable else "no", s.reason)
                for s in self.stages
            ]
            tables.append(_table(heads, rows, "rlrrll"))
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([self.model, *tables, *_skip_lines(self.skips), *notes])

    def _block_table(self) -> str:
        table = "no block found that tokens could leave after"
        if self.rows:
            heads = ("block", "where", "kind", "tokens", "attention", "why not flash", "prunable", "until", "why not")
            rows = [
                (
                    _number(row.block),
                    row.where,
                    row.kind,
                    _number(row.tokens, row.sequences),
                    row.attention_kernel or "-",
                    row.kernel_reason,
                    "yes" if row.prunable else "no",
                    row.until,
                    row.reason,
                )
                for row in self.rows
            ]
            table = _table(heads, rows, "rllrlllll")
        return table

    def to_json(self) -> str:
        """The same content as JSON."""
        return _json(
            model=self.model,
            rows=[asdict(row) for row in self.rows],
            stages=[asdict(row) for row in self.stages],
            skips=[asdict(skip) for skip in self.skips],
            notes=list(self.notes),
        )


def _grid(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _giga(value: int) -> str:
    return f"{value / 1e9:.3f}"


def _number(value: int | None, times: int = 1) -> str:
    number = "-" if value is None else str(value)
    return number if times == 1 else f"{times} x {number}"


def _json(**content: Any) -> str:
    return json.dumps(content, indent=2)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns aligned by "l" or "r"; one without content is left out, a reason that is long is wrapped."""
    columns = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    return tabulate(
        [[row[i] for i in columns] for row in rows],
        [heads[i] for i in columns],
        disable_numparse=True,
        colalign=["right" if align[i] == "r" else "left" for i in columns],
        maxcolwidths=[_REASON_WIDTH if heads[i].startswith("why") else None for i in columns],
    )


def _by_reason(skips: Iterable[Skip]) -> dict[str, list[Skip]]:
    found: dict[str, list[Skip]] = {}
    for skip in skips:
        found.setdefault(skip.reason, []).append(skip)
    return found


def _skip_lines(skips: Iterable[Skip]) -> list[str]:
    """Each distinct reason once, with how often it stood, the way out and the first source line that it stood at."""
    of_reason = _by_reason(skips)
    lines = ["skipped:"] if of_reason else []
    for reason, same in of_reason.items():
        indented = reason.replace("\n", "\n     ")
        lines.append(f"  {len(same)}x {indented}")
        if same[0].way_out:
            lines.append(f"     way out: {same[0].way_out}")
        places = list(dict.fromkeys(skip.where or f"node {skip.node}" for skip in same))
        more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
        lines.append(f"     at {places[0]}{more}")
    return lines


def kernel_cells(choice: KernelChoice | None) -> tuple[str, str]:
    """An attention kernel and, where it is not flash, why, for a row of a report."""
    return (choice.name, "" if choice.name == "flash" else choice.reason) if choice is not None else ("", "")
