"""Filling the columns of a table's rows: GFLOPs, throughput, accuracy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.tables import accuracy
from bench.tables.accuracy import Forwards
from bench.tables.methods import COMPILED, Method
from bench.tables.options import WHOLE_UMT, Setting, check_umt
from bench.tables.results import Results, environment
from bench.tables.subjects import Subject
from rs_compile import OptimizedModel, plan
from rs_compile.planning import plans
from rs_compile.timing import Call, interleaved

# options that choose rows and columns, or do not change a number
_CHOICES = (
    "command", "json", "out", "columns", "models", "methods", "curves", "keeps", "blocks", "dataset", "datasets",
    "timed", "workers",
)  # fmt: skip

Methods = Sequence[Method]


def results_of(args: argparse.Namespace, setting: Setting) -> Results:
    """The rows of an earlier run of this command with these settings, or none."""
    settings = {name: value for name, value in vars(args).items() if name not in _CHOICES and value}
    settings |= {"backend": setting.backend, "rounds": setting.rounds}
    if getattr(args, "annotations", None):  # otherwise it only chooses which figures of the paper are shown
        settings["dataset"] = args.dataset
    settings.pop("default_rounds")
    return Results(args.json, environment(args.command, {name: str(value) for name, value in settings.items()}))


def identity(subject: Subject, method: Method) -> dict[str, Any]:
    """What tells a row from the others."""
    return {"model": subject.name, "method": method.name, **method.at}


def say(text: str) -> None:
    """A line of progress."""
    print(f"  {text}", file=sys.stderr, flush=True)


def measurable(subject: Subject, args: argparse.Namespace) -> set[str]:
    """The columns that can be measured with the data at hand; the digits are for want of any other."""
    options = {"images": "imagenet", **{data: data for data in ("captions", "annotations", "answers")}}
    given = {data for data, option in options.items() if getattr(args, option, None)}
    if subject.data == "digits":
        return set() if given else {"gflops", "throughput", "accuracy"}
    return {"gflops", "throughput"} | ({"accuracy"} if subject.data in given else set())


def fill(
    results: Results,
    subject: Subject,
    methods: Methods,
    columns: Collection[str],
    setting: Setting,
    args: argparse.Namespace,
) -> None:
    """Measures what the rows of these methods lack: always GFLOPs, and the other columns asked for."""
    if "throughput" in columns:
        fill_throughput(results, subject, methods, setting)
    if "accuracy" in columns:
        fill_accuracy(results, subject, methods, setting, args)
    fill_gflops(results, subject, methods)  # where the others have not captured the model


def fill_gflops(results: Results, subject: Subject, methods: Methods) -> None:
    """GFLOPs of one sample on the rewritten graph, in fvcore's convention; no forward pass is run."""
    lacking = [m for m in methods if "gflops" not in results.row(identity(subject, m))]
    if lacking:
        model, sample = subject.on_meta()
        _capture(results, subject, [(m, m.apply(model, "eager")) for m in lacking], model, sample)


def _capture(results: Results, subject: Subject, forwards: Forwards, model: nn.Module, sample: Tensor) -> None:
    """Captures the model once for all that is to be run, and notes its GFLOPs."""
    say(f"{subject.name}: capturing the model")
    pruned = [(method, forward) for method, forward in forwards if isinstance(forward, OptimizedModel)]
    flops = {}
    if not pruned:
        flops[""] = plan(model, {}, sample).flops_dense
    for (method, _), report in zip(pruned, plans([forward for _, forward in pruned], sample), strict=True):
        say(f"{subject.name}, {method.label}: rewritten")
        flops |= {method.label: report.flops, "": report.flops_dense}
    for method, forward in forwards:
        gflops = flops[method.label if isinstance(forward, OptimizedModel) else ""] / 1e9
        printed = subject.paper.get(method.name)
        results.fill(identity(subject, method), {"gflops": gflops, **({"paper": printed} if printed else {})})


def fill_throughput(results: Results, subject: Subject, methods: Methods, setting: Setting) -> None:
    """Samples a second and speed-up over the first method, all interleaved in one run."""
    if not results.lacking([identity(subject, m) for m in methods], "throughput"):
        return
    torch.compiler.reset()  # another model's batch size must not make this one's shapes dynamic
    torch.manual_seed(0)
    model = subject.make(False, None).to(setting.device, setting.dtype)
    batch = setting.batch(subject)
    inputs = torch.randn(batch, *subject.shape, generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(setting.device, setting.dtype)
    forwards = [(m, m.apply(model, setting.backend)) for m in methods]
    _capture(results, subject, forwards, model, inputs)
    calls: dict[str, Call] = {m.label: partial(forward, inputs) for m, forward in forwards}
    with torch.no_grad():
        timing = interleaved(
            calls, setting.rounds, device=setting.device, say=lambda text: say(f"{subject.name}: {text}")
        )
    for method in methods:
        spread = timing.ratio(methods[0].label, method.label)
        values = {
            "throughput": batch / timing.of(method.label).median,
            "speedup": spread.median,
            "speedup_quartiles": [spread.low, spread.high],
            "batch": batch,
            "rounds_seconds": list(timing.seconds[method.label]),
        }
        results.fill(identity(subject, method), values)


def fill_accuracy(
    results: Results, subject: Subject, methods: Methods, setting: Setting, args: argparse.Namespace
) -> None:
    """Accuracy of every method but the compiled base, which is the base, on what the subject can be measured on.

    Without a checkpoint DeiT has timm's pretrained weights, and the digits ViT its own.
    """
    methods = [m for m in methods if m.name != COMPILED]
    if not results.lacking([identity(subject, m) for m in methods], "accuracy"):
        return
    if subject.data == "digits":  # a method at a time
        methods = [m for m in methods if "accuracy" not in results.row(identity(subject, m))]
    say(f"{subject.name}: accuracy")
    # beside the rows, so that an interrupted evaluation goes on as well
    resume = args.json and args.json.with_name(f"{args.json.name}.{subject.name.replace('/', '-')}.resume")
    if subject.data in WHOLE_UMT:
        check_umt(args, subject)
        from bench.tables import umt_accuracy

        scores = umt_accuracy.measure(subject, methods, setting, args, resume)
        for method in methods:
            results.fill(identity(subject, method), scores[method.label])
        return
    checkpoint = dict(getattr(args, "checkpoint", ())).get(subject.name)
    model = subject.make(checkpoint is None, checkpoint).to(setting.device, setting.dtype)
    sample = torch.zeros(1, *subject.shape, device=setting.device, dtype=setting.dtype)
    # digits are few: compiling would take longer than it saves
    backend = "eager" if subject.data == "digits" else setting.backend
    forwards = [(m, m.apply(model, backend)) for m in methods]
    _capture(results, subject, forwards, model, sample)
    if subject.data == "digits":
        for method, forward in forwards:
            say(f"{subject.name}, {method.label}: accuracy")
            results.fill(identity(subject, method), accuracy.on_digits(forward, setting))
        return
    measure = accuracy.on_images if subject.data == "images" else accuracy.on_videos
    scores = measure(subject, model, forwards, setting, args, resume)
    for method in methods:
        results.fill(identity(subject, method), scores[method.label])
