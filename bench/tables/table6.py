"""Table 6: ResNet-34 and -50 as they are, and with rows and columns pruned line-wise and token-wise.

GFLOPs and throughput with random weights, base and pruned each in the memory format that is fastest for it;
accuracy on --imagenet, with weights that were fine-tuned on the smaller grid (`python -m bench finetune`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from tabulate import tabulate
from torch import nn

from bench.tables.comparison import add_choices, as_quick, untimed
from bench.tables.measure import fill_accuracy, fill_gflops, identity, measurable, results_of, say
from bench.tables.methods import BASE, Method
from bench.tables.notes import give, notes
from bench.tables.options import Setting, add_data_arguments
from bench.tables.options import add_arguments as add_shared
from bench.tables.results import Results, Row, shown
from bench.tables.subjects import Paper, Subject
from passes.sites.grid_prune import GridPrune
from rs_compile import Schedule, Shift
from rs_compile.models import build
from rs_compile.timing import Call, interleaved

LINE, TOKEN = "line-wise", "token-wise"
PAPER: dict[str, Paper] = {
    "ResNet-34": {
        BASE: {"accuracy": 73.2, "throughput": 5811, "gflops": 3.7},
        LINE: {"accuracy": 72.8, "throughput": 7112, "gflops": 2.5},
        TOKEN: {"accuracy": 72.2, "throughput": 6867, "gflops": 2.5},
    },
    "ResNet-50": {
        BASE: {"accuracy": 76.1, "throughput": 2927, "gflops": 4.1},
        LINE: {"accuracy": 76.4, "throughput": 3553, "gflops": 2.7},
        TOKEN: {"accuracy": 75.9, "throughput": 3489, "gflops": 2.7},
    },
}
METHODS = {
    BASE: Method(BASE, compiled=True),
    LINE: Method(LINE, Schedule(grid={0: GridPrune(8, 8, "line"), 1: GridPrune(4, 4, "line")})),
    TOKEN: Method(TOKEN, Schedule(grid={0: GridPrune(8, 8, "token"), 1: GridPrune(4, 4, "token")})),
}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
FINE_TUNED = "paper's accuracy: after 100 epochs of fine-tuning on the smaller grid."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_choices(parser, tuple(PAPER), tuple(METHODS))
    add_shared(parser)
    add_data_arguments(parser, images=True)


def run(args: argparse.Namespace) -> int:
    setting = Setting.of(args)
    results = results_of(args, setting)
    methods = [METHODS[name] for name in args.methods]
    rows: list[tuple[Subject, Row]] = []
    for subject in (resnet(name, setting.quick) for name in args.models):
        columns = set(setting.columns) & measurable(subject, args)
        if "throughput" in columns:
            fill_throughput(results, subject, methods, setting)
        if "accuracy" in columns:
            fill_accuracy(results, subject, methods, setting, args)
        fill_gflops(results, subject, methods)
        rows += [(subject, results.row(identity(subject, method))) for method in methods]
    if setting.quick:
        rows = [(as_quick(subject), untimed(row)) for subject, row in rows]
    return give(text(rows), notes([row for _, row in rows], setting, FINE_TUNED), results.rows)


def resnet(name: str, quick: bool) -> Subject:
    """timm's ResNet-34 or -50 (stride on the 3x3), 224 x 224; quick: one block a stage, 96 x 96."""
    side = 96 if quick else 224

    def make(pretrained: bool, checkpoint: Path | None) -> nn.Module:
        kind = name.lower().replace("-", "")
        if quick:
            return timm.create_model(kind, layers=(1, 1, 1, 1)).eval()
        return build(kind, pretrained=pretrained, checkpoint=checkpoint)

    paper = {} if quick else PAPER[name]
    return Subject(name, make, (3, side, side), {}, Shift(), (16, 256), paper, "images")


@torch.no_grad()
def fill_throughput(results: Results, subject: Subject, methods: Sequence[Method], setting: Setting) -> None:
    """Images a second of each method in its best memory format, and speed-up over the first method in its own."""
    if not results.lacking([identity(subject, m) for m in methods], "throughput"):
        return
    torch.compiler.reset()  # another model's batch size must not make this one's shapes dynamic
    batch = setting.batch(subject)
    inputs = torch.randn(batch, *subject.shape, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Call] = {}
    for layout, memory_format in FORMATS.items():
        torch.manual_seed(0)
        model = subject.make(False, None).to(setting.device, setting.dtype).to(memory_format=memory_format)
        x = inputs.to(setting.device, setting.dtype, memory_format=memory_format)
        calls |= {f"{m.label}, {layout}": partial(m.apply(model, setting.backend), x) for m in methods}
    timing = interleaved(calls, setting.rounds, device=setting.device, say=lambda text: say(f"{subject.name}: {text}"))

    def fastest(method: Method) -> str:
        return min(FORMATS, key=lambda layout: timing.of(f"{method.label}, {layout}").median)

    base = f"{methods[0].label}, {fastest(methods[0])}"
    for method in methods:
        label = f"{method.label}, {fastest(method)}"
        spread = timing.ratio(base, label)
        values = {
            "throughput": batch / timing.of(label).median,
            "memory_format": fastest(method),
            "speedup": spread.median,
            "speedup_quartiles": [spread.low, spread.high],
            "batch": batch,
            "rounds_seconds": {layout: list(timing.seconds[f"{method.label}, {layout}"]) for layout in FORMATS},
        }
        results.fill(identity(subject, method), values)


def text(rows: Sequence[tuple[Subject, Row]]) -> str:
    """The rows as a table; a column that nobody measured is left out."""
    heads = ["model", "method", "GFLOPs", "paper", "img/s", "memory format", "speed-up [quartiles]", "paper"]
    heads += ["top-1", "paper"]
    lines = []
    for subject, row in rows:
        printed = subject.paper.get(row["method"], {})
        speed_up, paper_speed = "", ""
        if "speedup" in row:
            low, high = row["speedup_quartiles"]
            speed_up = f"{row['speedup']:.2f}x [{low:.2f}, {high:.2f}]"
        if printed:
            faster = printed["throughput"] / subject.paper[BASE]["throughput"]
            paper_speed = f"{printed['throughput']:g} ({faster:.2f}x)"
        lines.append(
            [
                subject.name,
                "base, torch.compile" if row["method"] == BASE else row["method"],
                f"{row['gflops']:.3f}",
                f"{printed['gflops']:.1f}" if printed else "",
                f"{row['throughput']:.4g}" if "throughput" in row else "",
                row.get("memory_format", ""),
                speed_up,
                paper_speed,
                shown(row),
                f"{printed['accuracy']:.1f}" if printed else "",
            ]
        )
    filled = [i for i in range(len(heads)) if any(line[i] for line in lines)]
    align = ["left", "left", "right", "right", "right", "left", "left", "right", "right", "right"]
    return tabulate(
        [[line[i] for i in filled] for line in lines],
        [heads[i] for i in filled],
        disable_numparse=True,
        colalign=[align[i] for i in filled],
    )
