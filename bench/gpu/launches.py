"""Kernels that a site launches, counted by the profiler, beside the counts that `tests/gpu_lowering` predicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from bench.gpu.document import Table
from bench.gpu.plan import Setting, Step
from bench.gpu.profiled import by_attention, kind, traced
from bench.gpu.rows import fill_row, forget
from bench.tables.methods import OURS, STREAM, WARD, Method, merging
from bench.tables.results import Results, Row
from rs_compile import GridPrune, Schedule
from rs_compile.commands import DTYPES

DEPTH, SITES = 4, (0, 1, 2)
CNN = "CNN"


@dataclass(frozen=True)
class Case:
    """A small model and what leaves it.

    Args:
        name: in rows.
        way: how it is rewritten, a dense one by nothing.
        dense: the case to compare with, its own name for a dense one.
        batch: samples of a call.
        predicted: launches more than the dense model's, by `tests/gpu_lowering`.
        side: of the images in pixels; patches are 16 x 16.
    """

    name: str
    way: Method
    dense: str
    batch: int
    predicted: int
    side: int = 224


def cases(tiny: bool) -> list[Case]:
    """The kinds of sites of ARCHITECTURE.md's table: four blocks, three sites, width 384."""
    # of a few tokens one must leave
    keep, share = dict.fromkeys(SITES, 0.8 if tiny else 0.95), dict.fromkeys(SITES, 0.1)
    few, many, small, large = (2, 260, 64, 368) if tiny else (64, 512, 224, 384)
    lines = Schedule(grid=dict.fromkeys(SITES, GridPrune(rows=2, columns=2)))
    three, attentions = len(SITES), DEPTH
    dense, dense_cnn, whole = "dense", "dense CNN", Method("dense", Schedule())
    ours, mine = Method(OURS, Schedule(keep)), partial(Case, dense=dense)
    return [
        mine(dense, whole, batch=few, predicted=0, side=small),
        mine("pruned", ours, batch=few, predicted=2 * three, side=small),
        mine("merged, with size bias", merging(STREAM, share), batch=few, predicted=8 * three, side=small),
        mine(
            "merged by Ward's cost", merging(WARD, share), batch=few, predicted=9 * three + 2 * attentions, side=small
        ),
        mine("pruned, above 256 samples", ours, batch=many, predicted=3 * three, side=small),
        mine("pruned, above 512 tokens", ours, batch=2, predicted=3 * three, side=large),
        Case(dense_cnn, whole, dense_cnn, few, 0, small),
        Case("CNN, whole lines", Method("lines", lines), dense_cnn, few, 3 * three, small),
    ]


def network(case: Case, tiny: bool) -> nn.Module:
    """A ViT of four blocks, or a residual CNN, narrow where it is tiny."""
    if CNN in case.name:
        kind: Any = BasicBlock  # timm's annotation asks for one of its instances
        return ResNet(kind, (1, 1, 1, 1), num_classes=10).eval()
    width, heads = (48, 3) if tiny else (384, 6)
    options: dict[str, Any] = {"img_size": case.side, "depth": DEPTH, "embed_dim": width, "num_heads": heads}
    return timm.create_model("vit_small_patch16_224", num_classes=10, **options).eval()


def measure(step: Step, setting: Setting, results: Results) -> None:
    """A row for each case."""
    for case in cases(setting.tiny):
        fill_row(results, {"case": case.name, "dtype": step.dtype}, partial(counted, case, step.dtype, setting))
        forget()


def counted(case: Case, dtype: str, setting: Setting) -> Mapping[str, Any]:
    """Launches of a call: how many, of which kind, and from each attention to the next."""
    device = torch.device(setting.device)
    model = network(case, setting.tiny).to(device, DTYPES[dtype])
    images = torch.randn(case.batch, 3, case.side, case.side, generator=torch.Generator().manual_seed(0))
    images = images.to(device, DTYPES[dtype])
    call = partial(case.way.apply(model, setting.backend), images)
    call()
    kernels = traced(call, device).kernels
    return {
        "launches": len(kernels),
        "kinds": dict(Counter(map(kind, kernels))),
        "parts": [dict(Counter(map(kind, part))) for part in by_attention(kernels)],
        "names": kernels,
        "dense": case.dense,
        "predicted": case.predicted,
        "batch": case.batch,
        "compiled": setting.backend == "inductor",
    }


def tables(rows: Sequence[Row]) -> list[Table]:
    """Launches beside the dense model's, a verdict for each case."""
    of = {row["case"]: row for row in rows if not row["failed"]}
    lines, verdicts = [], []
    for row in rows:
        if row["failed"]:
            lines.append([row["case"], f"failed: {row['failed']}", *[""] * 5])
            continue
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(row["kinds"].items()))
        same = [row["case"], str(row["batch"]), str(row["launches"]), kinds]
        if row["case"] == row["dense"] or row["dense"] not in of:
            lines.append([*same, "", "", ""])
            continue
        more = row["launches"] - of[row["dense"]]["launches"]
        sites = len(SITES)
        lines.append([*same, str(more), str(row["predicted"]), f"{more / sites:.3g} ({row['predicted'] / sites:.3g})"])
        if not row["compiled"]:
            continue
        if more == row["predicted"]:
            verdicts.append(f"{row['case']}: {more} launches more than dense, as predicted")
        else:
            verdicts.append(f"{row['case']}: {more} launches more than dense; predicted were {row['predicted']}")
    notes = [
        f"{len(SITES)} sites. The kernels of a product depend on its shape: cuBLAS may split one into several "
        "launches, which the prediction counts as one."
    ]
    if any(not row["compiled"] for row in of.values()):
        notes.insert(0, "Not compiled here: ops are counted, not launches, and the prediction says nothing of them.")
    heads = ("case", "batch", "launches", "of which", "more than dense", "predicted", "a site (predicted)")
    return [Table("Launches", heads, lines, verdicts, notes)]
