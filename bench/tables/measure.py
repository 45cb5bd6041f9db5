"""Filling the columns of a table's rows: GFLOPs, throughput, accuracy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bench.tables import accuracy
from bench.tables.methods import COMPILED, Method
from bench.tables.options import Setting
from bench.tables.results import Results, environment
from bench.tables.subjects import Subject
from rs_compile import plan
from rs_compile.timing import Call, interleaved

_SETTINGS = ("quick", "device", "dtype", "batch_size", "baseline_eager_everywhere")

Methods = Sequence[Method]


def results_of(args: argparse.Namespace, setting: Setting) -> Results:
    """The rows of an earlier run of this command with these settings, or none."""
    settings = {name: getattr(args, name) for name in _SETTINGS}
    settings |= {"backend": setting.backend, "rounds": setting.rounds}
    data = {name: str(getattr(args, name)) for name in ("imagenet", "limit", "checkpoint") if getattr(args, name, None)}
    return Results(args.json, environment(args.command, settings | data))


def identity(subject: Subject, method: Method) -> dict[str, Any]:
    """What tells a row from the others."""
    return {"model": subject.name, "method": method.name, **method.at}


def say(text: str) -> None:
    """A line of progress."""
    print(f"  {text}", file=sys.stderr, flush=True)


def fill_gflops(results: Results, subject: Subject, methods: Methods) -> None:
    """GFLOPs of one sample on the rewritten graph, in fvcore's convention; no forward pass is run."""
    if not results.lacking([identity(subject, m) for m in methods], "gflops"):
        return
    model, sample = subject.on_meta()
    dense: float | None = None
    for method in sorted(methods, key=lambda m: m.schedule is None):  # a pruned one knows the dense count too
        if not results.lacking([identity(subject, method)], "gflops"):
            continue
        if method.schedule is not None or dense is None:
            say(f"{subject.name}, {method.label}: GFLOPs")
            report = plan(model, method.schedule or {}, sample, **method.options)
            dense = report.flops_dense / 1e9
            value = report.flops / 1e9
        else:
            value = dense
        printed = subject.paper.get(method.name)
        results.fill(identity(subject, method), {"gflops": value, **({"paper": printed} if printed else {})})


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
    calls: dict[str, Call] = {m.label: partial(m.apply(model, setting.backend), inputs) for m in methods}
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
    """Accuracy of every method but the compiled base, which is the base, on what the subject can be measured on."""
    methods = [m for m in methods if m.name != COMPILED]
    if subject.data == "digits":
        _accuracy_on_digits(results, subject, methods, setting)
    else:
        _accuracy_on_images(results, subject, methods, setting, args)


def _accuracy_on_digits(results: Results, subject: Subject, methods: Methods, setting: Setting) -> None:
    """Accuracy of the digits ViT, method by method; uncompiled, which changes nothing but speed."""
    model = subject.make(True, None)
    for method in methods:
        if results.lacking([identity(subject, method)], "accuracy"):
            say(f"{subject.name}, {method.label}: accuracy")
            values = accuracy.on_digits(method.apply(model, "eager"), setting.quick)
            results.fill(identity(subject, method), values)


def _accuracy_on_images(
    results: Results, subject: Subject, methods: Methods, setting: Setting, args: argparse.Namespace
) -> None:
    """Accuracy and drift on --imagenet, all methods on the same batches."""
    if not results.lacking([identity(subject, m) for m in methods], "accuracy"):
        return
    say(f"{subject.name}: accuracy on {args.imagenet}")
    checkpoint = dict(args.checkpoint).get(subject.name)
    model = subject.make(checkpoint is None, checkpoint).to(setting.device, setting.dtype)
    scores = accuracy.on_images(
        model,
        {m.label: m.apply(model, setting.backend) for m in methods},
        methods[0].label,
        args.imagenet,
        batch_size=setting.batch(subject),
        workers=args.workers,
        device=setting.device,
        dtype=setting.dtype,
        # beside the rows, so that an interrupted evaluation goes on as well
        resume=setting.json and setting.json.with_name(f"{setting.json.name}.{subject.name}.resume"),
        limit=args.limit,
    )
    for method in methods:
        results.fill(identity(subject, method), scores[method.label])


def timed(methods: Methods, backend: str) -> list[Method]:
    """The methods that can run: uncompiled, torch.compile(base) is base-sdpa."""
    return [m for m in methods if m.name != COMPILED or backend != "eager"]
