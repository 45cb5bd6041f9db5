"""Filling the columns of a table's rows: GFLOPs, throughput, accuracy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.tables import accuracy
from bench.tables.methods import COMPILED, Method
from bench.tables.options import Setting
from bench.tables.results import Results, environment
from bench.tables.subjects import Subject
from rs_compile import OptimizedModel, plan
from rs_compile.optimize import plans
from rs_compile.timing import Call, interleaved

_SETTINGS = ("quick", "device", "dtype", "batch_size", "baseline_eager_everywhere")

Methods = Sequence[Method]
Forwards = Sequence[tuple[Method, Callable[..., Any]]]


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
    """Accuracy of every method but the compiled base, which is the base, on what the subject can be measured on."""
    methods = [m for m in methods if m.name != COMPILED]
    if subject.data == "digits":
        _accuracy_on_digits(results, subject, methods, setting)
    else:
        _accuracy_on_images(results, subject, methods, setting, args)


def _accuracy_on_digits(results: Results, subject: Subject, methods: Methods, setting: Setting) -> None:
    """Method by method; uncompiled, which changes nothing but speed."""
    model = subject.make(True, None)
    forwards = [(m, m.apply(model, "eager")) for m in methods if results.lacking([identity(subject, m)], "accuracy")]
    if forwards:
        _capture(results, subject, forwards, model, torch.zeros(1, *subject.shape))
    for method, forward in forwards:
        say(f"{subject.name}, {method.label}: accuracy")
        results.fill(identity(subject, method), accuracy.on_digits(forward, setting.quick))


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
