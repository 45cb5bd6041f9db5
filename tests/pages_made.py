"""Results made by hand, for pages: their numbers are known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench.gpu.journal import Journal, Outcome, rows_file
from bench.gpu.plan import STEPS, Setting
from bench.gpu.size_bias import CHANNELS, MASK
from bench.tables.methods import ATTENTION, BASE, OURS
from bench.tables.methods import COMPILED as BASELINE
from passes.graph.base import Skip
from passes.network.patch_grid import Extent, PatchGrid
from rs_compile import Schedule, SearchResult, Ward
from rs_compile.comparison import Comparison, Sweep
from rs_compile.demo.result import CompiledSpeed, Demo
from rs_compile.demo.result import Row as DemoRow
from rs_compile.report import BlockRow, Report, StageRow
from rs_compile.search.rows import Row
from rs_compile.side_by_side import OutputDrift, SideBySide
from rs_compile.timing import COMPILED, EAGER, PRUNED, Spread, Timing
from rs_compile.visualize import LayerMaps, ScoreMaps, SiteMap

WAY_OUT = "call F.scaled_dot_product_attention"
HOSTILE = "</script><img src=x onerror=\"document.title='run'\">&amp; $1\u2028.png"

REPORT = Report(
    model="a <b>model</b>",
    signature="float32[B, 3, 224, 224] on cpu",
    blocks=(
        BlockRow(0, "blocks.0", 200, 150, 400_000_000, 400_000_000, "flash"),
        BlockRow(1, "blocks.1", 150, 150, 400_000_000, 300_000_000, "math", "mask needs a gradient"),
        BlockRow(2, "blocks.2", 150, 150, 400_000_000, 300_000_000, "math", "mask needs a gradient"),
        BlockRow(10, HOSTILE, None, None, 1_000_000, 500_000),
    ),
    macs_dense=1_300_000_000,
    macs=1_050_500_000,
    flops_dense=1_310_000_000,
    flops=1_010_000_000,
    skips=(
        Skip("softmax", "softmax over channels", 'File "vit.py", line 3: a.softmax(1)', WAY_OUT),
        Skip("softmax_1", "softmax over channels", 'File "vit.py", line 9: b.softmax(1)', WAY_OUT),
        Skip("mul", HOSTILE),
    ),
    merging="merging: ward, no size bias",
)  # fmt: skip
GRID_REPORT = Report(
    "Net", "float32[B, 3, 64, 64] on cpu", (), 100_000_000, 80_000_000, 0, 0,
    stages=(StageRow(0, "layer1", (16, 16), (8, 16), 50_000_000, 50_000_000),
            StageRow(1, "layer2", (8, 8), (8, 8), 40_000_000, 20_000_000)),
)  # fmt: skip
TIMING = Timing({COMPILED: (0.2, 0.4, 0.3), PRUNED: (0.1, 0.2, 0.2), EAGER: (0.4, 0.5, 0.6)})
BESIDE = SideBySide(
    (OutputDrift("pooled", (0.1, 0.3)), OutputDrift("last", (0.0, 0.02))),
    0.25, 0.5, 2, Timing({k: v for k, v in TIMING.seconds.items() if k != EAGER}), COMPILED, REPORT,
)  # fmt: skip


def sweep() -> Sweep:
    handle: Any = SimpleNamespace(report=lambda: REPORT)
    settings = {"dtype": "float32", "rounds": 3}
    return Sweep(tuple(Comparison(TIMING, COMPILED, batch, handle, settings) for batch in (1, 16)), "a <b>model</b>")


def search_result() -> SearchResult:
    def row(method: str, macs: int, drift: float | None, schedule: Schedule, **more: Any) -> Row:
        return Row(method, "uniform from 1", schedule, macs, drift, None if drift is None else drift / 10, **more)

    ward = Schedule(merge={1: 8}, by=Ward())
    rows = (
        row("Ward", 60, 0.01, ward, held_drift=0.02, held_error=0.001, speedup=Spread(1.5, 1.4, 1.6)),
        row("prune: shift", 50, 0.1, Schedule({1: 0.5}), held_drift=0.2),
        row("prune: shift", 65, 0.05, Schedule({1: 0.7})),
        row("prune: random", 55, 0.5, Schedule({2: 0.5}), draws=3),
        row("ToMe", 0, None, Schedule(merge={1: 8}), refused="ToMe compares keys\n  way out: use Stream()"),
        row("Ward", 80, None, ward, refused="costs more"),
    )
    settings = {"model": "Vit", "seed": 0, "backend": "eager", "threads": 2}
    return SearchResult("0.6 of the <b>", rows[0], rows, "1 - cosine", 100, 6, 6, 6, "it has least drift.", settings)


# two pictures of two rows and three columns; the second one's scores are ten times as much
GRID = PatchGrid(Extent(2, 0, 16, 16), Extent(3, 0, 16, 16), (None, *range(6)))
SIZE = (32, 48)
VALUES = torch.tensor([[[0.0, 1, 2], [3, 4, 5]], [[5.0, 4, 3], [2, 1, 0]]])
LAYERS = tuple(
    LayerMaps(block, f"blocks.{block}", GRID, torch.stack([v, 10 * v]), attention, "class attention")
    for block, v, attention in ((1, VALUES[0], torch.stack([VALUES[1] / 8] * 2)), (5, VALUES[1], None))
)
# after block 3 cell 4 stands for 1 too, and 2 has left; in the second picture 0 stands for 3
STANDS = torch.tensor([[[0, 4, -1], [3, 4, 5]], [[0, 1, 2], [0, -1, 5]]])
SITES = (SiteMap(0, GRID, torch.arange(6).view(1, 2, 3).repeat(2, 1, 1), 7, 7), SiteMap(3, GRID, STANDS, 5, 7))
MAPS = ScoreMaps(SIZE, "block", "MLP shift, l2", LAYERS, SITES)
SCHEDULE = Schedule({0: 1.0}, merge={3: 1}, by=Ward())


def photos() -> list[Any]:
    """All black but cells 1 and 4 of the first one, white and red."""
    made = [np.zeros((*SIZE, 3)) for _ in range(2)]
    made[0][:16, 16:32] = 1
    made[0][16:, 16:32, 0] = 1
    return made


def demo() -> Demo:
    """Two budgets; the second one at the width of the real table."""
    methods = ("shift", "class attention", "Ward merging", "random", "lowest shift")

    def row(keep: float, *tokens: int) -> DemoRow:
        shares = {name: (keep, keep - 0.1) if name == "random" else (keep,) for name in methods}
        return DemoRow(keep, tokens, dict.fromkeys(methods, keep), shares, dict.fromkeys(methods[:3], SPREAD))

    rows = (row(0.7, 138, 97, 68), row(0.3, 59, 18, 5))
    return Demo(596, (0, 2, 4), 0.955, 197, 0.53, 0.25, 64, 2, 9, rows, CompiledSpeed(0.5, 0.2, SPREAD))


SPREAD = Spread(1.7, 1.6, 1.8)
GPU_STEPS = [STEPS[name] for name in ("deit-s-float16", "launches", "graphs", "size-bias")]


def gpu_journal(out: Path) -> Journal:
    """Rows of three steps, as their processes leave them; a fourth could not run."""
    kinds = {"generated": 2, "product": 4, "attention": 1}
    speed = {"model": "DeiT-S", "dtype": "float16", "batch": 64, "failed": "", "speedup_quartiles": [1.4, 1.6]}
    speed |= {"throughput": 1000.0, "macs_ratio": 1.5, "of_limit": 0.9, "peak_bytes": 2**28, "speedup": 1.5}
    speed |= {"over_eager": 1.9, "over_eager_quartiles": [1.8, 2.0]}
    counted = {"failed": "", "launches": 35, "kinds": kinds, "parts": [kinds] * 5, "dense": "dense", "batch": 64}
    counted |= {"predicted": 6, "compiled": True}
    biased = {"failed": "", "samples": 64, "milliseconds": {MASK: 0.2, CHANNELS: 0.3}}
    biased |= {"off": {MASK: 1e-3, CHANNELS: 1e-3}}
    rows = {
        "deit-s-float16": [speed | {"method": name} for name in (BASE, BASELINE, OURS, ATTENTION)],
        "launches": [counted | {"case": "dense"}, counted | {"case": "pruned <b>", "launches": 41}],
        "size-bias": [
            biased | {"tokens": n, "ratio": {"median": r, "quartile_low": 0.9 * r, "quartile_high": 1.1 * r}}
            for n, r in ((197, 0.5), (785, 2.0))
        ],
    }
    journal = Journal(out, Setting("cuda", tiny=False))
    for step, found in rows.items():
        where = {"command": "gpu", "gpu": "a GPU that is not there", "torch": torch.__version__}
        rows_file(out, step).write_text(json.dumps({"environment": where, "rows": found}))
        journal.note(step, Outcome("done", 60.0))
    journal.note("graphs", Outcome("cannot run", 1.0, HOSTILE))
    return journal
