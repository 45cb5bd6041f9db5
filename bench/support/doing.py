"""What one family's model really does: each column of the matrix is tried, and the outcome or the refusal noted."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, StackDataset

import rs_compile
from bench.coverage.check import as_call, call, differs, first_line, randomise
from bench.support.families import Family
from passes.attention.attention_kernel import FLASH, KernelChoice, kernels
from passes.graph.base import CompileError
from rs_compile import GridPrune, Schedule
from rs_compile.report import Explanation
from rs_compile.search.methods import GRIDS

if TYPE_CHECKING:
    from bench.gpu.lowering import Generated

COLUMNS = ("prune", "merge", "train", "export", "gpu", "search", "onnx")  # methods of `Tried`, the cheap ones first
BATCH, PICTURES = 2, 8
MERGERS = {
    "Ward": rs_compile.Ward(),
    "Stream": rs_compile.Stream(),
    "Stream without size bias": rs_compile.Stream(size_bias=False),
}
Cell = dict[str, Any]


class Idle(Exception):
    """It runs and is right, and saves nothing."""


class Wrong(Exception):
    """It ran, and the result is not what it must be."""


def tried(family: Family) -> Tried:
    """The family's model with random weights, on which each column can be tried."""
    torch.manual_seed(0)
    model = family.build().eval()
    randomise(model)
    return Tried(model, family.inputs)


def outcome(attempt: Callable[[], str]) -> Cell:
    """A cell: what an attempt says, or why it did not come to that."""
    try:
        return {"result": "yes", "note": attempt()}
    except CompileError as refusal:
        return {"result": "refused", "code": str(refusal.code), "note": refusal.text.partition("\n")[0]}
    except Idle as idle:
        return {"result": "no", "note": str(idle)}
    except Wrong as wrong:
        return {"result": "WRONG", "note": str(wrong)}
    except Exception as error:
        return {"result": "FAULT", "note": f"{type(error).__name__}: {first_line(error)}"}


class Tried:
    """A model and what can be tried on it. Each method returns a word for the cell, or raises."""

    def __init__(self, model: nn.Module, inputs: Callable[[int], Tensor | Mapping[str, Any]]) -> None:
        self.model, self.inputs = model, inputs
        self.given = inputs(BATCH)
        self.dense = call(model, self.given)()

    def prune(self) -> str:
        """Tokens leave after the first block that lets them, or rows and columns after the first stage."""
        self._short(self._pruned())
        if self._grid():
            return "rows and columns"
        blocks = sum(r.block is not None for r in self._explained.rows)
        return "every block" if len(self._able) == blocks else f"{len(self._able)} of {blocks} blocks"

    def merge(self) -> str:
        """By the first of `MERGERS` that fits, in the first block that takes it."""
        if isinstance(self._merger, Exception):
            raise self._merger
        return self._merger

    def search(self) -> str:
        """Among pruning by shift and the merging that fits, to a share of the multiply-accumulates."""
        given = self.inputs(PICTURES)
        pictures = given if isinstance(given, Tensor) else DataLoader(StackDataset(**given), batch_size=4)
        methods = ["prune: shift", *(["Ward"] if self._merger == "Ward" else [])]
        if self._grid():
            methods = [GRIDS[0].name]
        found = rs_compile.search(
            self.model, pictures, macs=0.9, methods=methods, batch_size=4, backend="eager", progress=False
        )
        if not found.schedule.prunes:
            raise Wrong("the schedule found leaves every token in")
        return ""

    def train(self) -> str:
        """A step of training: each parameter that has a gradient in the dense model has one in the pruned."""
        names = [_reached(m, self.given) for m in (self.model, self._optimized(self._pruned()))]
        if names[0] - names[1]:
            raise Wrong(f"no gradient for {min(names[0] - names[1])}")
        return ""

    def export(self) -> str:
        """A .pt2 that gives what the handle gives, to the bit."""
        fast = self._optimized(self._pruned())
        wanted = call(fast, self.given)()
        args, kwargs = as_call(self.given)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pt2"
            rs_compile.export(fast, args, path, kwargs=kwargs)
            module = torch.export.load(path).module()
        got, spec = call(module, self.given)(), pytree.tree_leaves(wanted)
        if wrong := differs(pytree.tree_leaves(got), spec, 0.0)[1]:
            raise Wrong(wrong)
        return ""

    def onnx(self) -> str:
        """An .onnx that ONNX Runtime runs, with the handle's outputs."""
        import onnxruntime

        fast = self._optimized(self._pruned())
        wanted = [x for x in pytree.tree_leaves(call(fast, self.given)()) if isinstance(x, Tensor)]
        args, kwargs = as_call(self.given)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            rs_compile.export(fast, args, path, kwargs=kwargs)
            session = onnxruntime.InferenceSession(str(path))
            feeds = dict(zip((i.name for i in session.get_inputs()), pytree.tree_leaves((args, kwargs)), strict=True))
            got = [torch.from_numpy(x) for x in session.run(None, {k: v.numpy() for k, v in feeds.items()})]
        if wrong := differs(got, wanted, 1e-3)[1]:
            raise Wrong(wrong)
        return ""

    def gpu(self) -> str:
        """Inductor's code for a GPU that is not here: how much of the attention is flash. Nothing runs."""
        found, code = self._lowered(self._pruned())
        flash = [choice.name == "flash" for choice in found]
        if (launched := code.launches.count(f"torch.ops.{FLASH}")) != sum(flash):
            raise Wrong(f"{sum(flash)} attentions are flash in the graph, and {launched} in the code")
        note = f"flash in {sum(flash)} of {len(flash)} attentions" if flash else "no attention"
        if others := sorted({choice.reason for choice in found if choice.name != "flash"}):
            note += f" ({'; '.join(others)})"
        if not code.records_cuda_graph:
            if self._lowered(Schedule())[1].records_cuda_graph:
                raise Wrong("the dense model can be recorded as a CUDA graph, and this cannot")
            note += "; no CUDA graph, nor of the dense model"
        return note

    def _lowered(self, schedule: Schedule) -> tuple[list[KernelChoice], Generated]:
        """In half precision for an H100: the kernel of each attention, and the code."""
        from bench.gpu.lowering import generate, on_cuda  # needs Triton

        args, kwargs = as_call(self.given)
        gm = on_cuda(copy.deepcopy(self.model), args, torch.float16, schedule, kwargs)
        return [choice for _, choice in kernels(gm)], generate(gm, BATCH)

    @cached_property
    def _merger(self) -> str | CompileError | Idle:
        """The first of `MERGERS` that fits, or why the first does not."""
        refusals: list[CompileError | Idle] = []
        for name, by in MERGERS.items():
            for block in self._able or [0]:
                try:
                    self._short(Schedule(merge={block: 0.25}, by=by))
                except (CompileError, Idle) as error:
                    refusals.append(error)
                else:
                    return name
        return refusals[0]

    @cached_property
    def _explained(self) -> Explanation:
        args, kwargs = as_call(self.given)
        return rs_compile.explain(self.model, args, kwargs)

    @property
    def _able(self) -> list[int]:
        return [r.block for r in self._explained.rows if r.prunable and r.block is not None]

    def _grid(self) -> bool:
        found = self._explained
        return not any(r.prunable for r in found.rows) and any(s.prunable for s in found.stages)

    def _pruned(self) -> Schedule:
        """The schedule of the prune column.

        Raises:
            CompileError: nothing can leave.
        """
        if self._able:
            return Schedule({self._able[0]: 0.7})
        stage = next((s for s in self._explained.stages if s.prunable and min(s.grid) > 1), None)
        if stage is None:
            raise self._refusal()
        rows, columns = (max(1, size // 4) for size in stage.grid)
        return Schedule(grid={stage.stage: GridPrune(rows, columns)})

    def _refusal(self) -> CompileError:
        """What the compiler says to tokens leaving after block 0."""
        try:
            self._short(Schedule({0: 0.7}))
        except CompileError as refusal:
            return refusal
        raise Wrong("explain knows no block, and a schedule of block 0 was taken")

    def _optimized(self, schedule: Schedule) -> Any:
        return rs_compile.optimize(copy.deepcopy(self.model), schedule, backend="eager")

    def _short(self, schedule: Schedule) -> None:
        """Runs it: outputs nested and shaped as the model's, fewer multiply-accumulates, another value."""
        fast = self._optimized(schedule)
        short = call(fast, self.given)()
        if wrong := differs(short, self.dense, None)[1]:
            raise Wrong(wrong)
        report = fast.report()
        if report.macs >= report.macs_dense:
            raise Idle("saves nothing where tokens can leave")
        if not differs(short, self.dense, 0.0)[1]:
            raise Wrong("the outputs are the model's to the bit, with tokens gone")


def _reached(model: Any, given: Any) -> set[str]:
    """The parameters that a backward pass reaches with a finite gradient that is not all zeros."""
    model = copy.deepcopy(model) if isinstance(model, nn.Module) and not hasattr(model, "report") else model
    model.train()
    args, kwargs = as_call(given)
    outputs = [x for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor) and x.requires_grad]
    torch.stack([x.float().square().mean() for x in outputs]).sum().backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all() and p.grad.any()}
