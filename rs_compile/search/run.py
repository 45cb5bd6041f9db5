"""The search: pictures in two halves, a target, schedules tried on one half and the best reported on the other."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passes.graph.codes import Code
from rs_compile.compiling import Backend
from rs_compile.optimize import OptimizedModel
from rs_compile.search.climb import Climb, Trial
from rs_compile.search.costs import Counted
from rs_compile.search.drift import Drift, Metric, choose
from rs_compile.search.evaluation import Evaluator, Half, Measured
from rs_compile.search.finalists import Stopwatch
from rs_compile.search.journal import Journal
from rs_compile.search.methods import GRIDS, RANDOM, SCANS, TOKENS, Method
from rs_compile.search.pictures import Pictures, SearchError, digest, halves, read
from rs_compile.search.progress import Bar, bar
from rs_compile.search.result import SearchResult
from rs_compile.search.rows import Row
from rs_compile.search.targets import Target, reach
from rs_compile.surroundings import check_model


def search(
    model: nn.Module,
    images: Any,
    *,
    speedup: float | None = None,
    macs: float | None = None,
    drift: float | None = None,
    metric: Metric | str | None = None,
    held_out: Any = None,
    methods: Collection[str] | None = None,
    every: bool = False,
    limit: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    backend: Backend = "inductor",
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> SearchResult:
    """The schedule that keeps a model's outputs nearest to the dense model's, for exactly one target.

    No labels are needed. Half of the pictures choose among few parameters (method, first block, slope); what is
    reported is measured on the other half. Candidates run uncompiled; those that are as good as the best by the
    standard error are compiled and timed beside torch.compile(model), in turns.

    Args:
        model: in eval mode, on the device that it is to run on.
        images: a tensor [n, C, H, W] as the model takes it, a folder (timm models), or a `DataLoader` of tensors,
            (tensor, labels) pairs or dicts of keyword inputs. At least 8, better 64.
        speedup: over torch.compile(model) in measured time, 1.5.
        macs: a share of the dense model's multiply-accumulates, not to be exceeded, 0.65.
        drift: at most so much on the pictures searched on, 0.01; the fastest below it is chosen.
        metric: what drift is: "cosine" (1 - cosine of features), "kl" (KL divergence of logits, nats), or a callable
            (outputs, dense outputs) -> [B], lower is better; one of three arguments is given the pictures' places in
            `images` [B] as well, so that it can look labels up. None: "kl" for logits of classes, else "cosine".
        held_out: further pictures to report on; all of `images` are then searched on.
        methods: names of those to choose among; None for all that there are. Random selection always runs beside.
        every: refine every method, not only those within 1.5 times the least drift; slower, for tables.
        limit: at most so many pictures are used; a random choice, of a loader the first.
        batch_size: pictures of a run, and of a timed call.
        seed: of the halves and of random selection; the same gives the same answer, but for measured times.
        backend: of finalists and of the model that they are timed beside; "eager" compiles nothing.
        resume: a file that keeps what is found; an interrupted search goes on from it.
        progress: a bar on stderr, with the time left.
        options: other arguments of `optimize`, like outputs or constant_inputs.

    Returns:
        A result with `.schedule`, which `optimize` takes, everything that was tried, and a verdict.

    Raises:
        SearchError: no such target, unfit pictures, or nothing reaches the target; the message names the nearest.
        CaptureError, Refusal: the model cannot be captured; before any long work.
    """
    target = Target(speedup, macs, drift)
    check_model(model, OptimizedModel)
    if model.training:
        raise SearchError(
            "the model is in train mode, in which its outputs are not those to keep; call model.eval()",
            code=Code.TRAIN_MODE,
        )
    with bar(progress) as shown:
        shown.say("reading pictures")
        searched, held = _two(model, images, held_out, limit, seed)
        pictures: dict[Half, Pictures] = {"search": searched, "held": held}
        shown.say("running the dense model")
        dense = {half: _dense(model, of, batch_size, options) for half, of in pictures.items()}
        chosen = choose(metric, model, dense["search"][0])
        setting = _setting(model, pictures, chosen, batch_size, seed, options) if resume is not None else {}
        journal = Journal(Path(resume) if resume is not None else None, setting)
        evaluator = Evaluator(model, pictures, chosen, dense, journal, batch_size, seed, options)
        shown.say("capturing the model")
        climb = _climb(evaluator, methods, every, shown)
        finalists = Stopwatch(evaluator, model, next(searched.batches(batch_size)), backend, shown)
        winner = reach(target, climb, finalists)
        return _result(target, winner, climb, finalists)


def _two(model: nn.Module, images: Any, held_out: Any, limit: int, seed: int) -> tuple[Pictures, Pictures]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if held_out is None:
        first, second = halves(read(images, model, limit, seed), seed)
    else:
        first, second = read(images, model, limit, seed), read(held_out, model, limit, seed)
    return first.to(device), second.to(device)


@torch.no_grad()
def _dense(model: nn.Module, pictures: Pictures, batch: int, options: Mapping[str, Any]) -> list[Any]:
    """The dense model's outputs, a batch at a time."""
    try:
        return [model(*part.args, **part.kwargs) for part in pictures.batches(batch)]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's code raises
        shapes = ", ".join(f"{name} {list(t.shape[1:])}".strip() for name, t in pictures.tensors.items())
        first = (str(error).strip().splitlines() or [""])[0]
        raise SearchError(
            f"{type(model).__name__} does not run on pictures of {shapes}: {type(error).__name__}: {first}\n"
            "  way out: give pictures of the size, dtype and number of channels that the model takes"
        ) from error


def _setting(
    model: nn.Module, pictures: Mapping[Half, Pictures], drift: Drift, batch: int, seed: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What records of a search depend on."""
    return {
        "model": type(model).__name__,
        "weights": digest(model.state_dict().items()),
        "pictures": [of.digest() for of in pictures.values()],
        "metric": drift.identity,
        "batch": batch,
        "seed": seed,
        "options": {name: str(value) for name, value in options.items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _climb(evaluator: Evaluator, names: Collection[str] | None, every: bool, shown: Bar) -> Climb:
    report, found = evaluator.first_look()
    rows = [(b.tokens_in or 0, b.tokens_out or 0, b.macs_dense) for b in report.blocks]
    tokens = [tokens for tokens, _, _ in rows]
    able = [r.block for r in found.rows if r.prunable and r.block is not None and tokens[r.block]]
    known: Sequence[Method] = TOKENS if any(b.attention_kernel for b in report.blocks) else SCANS
    if not able:
        tokens = [stage.grid[0] for stage in found.stages]
        able, known = [stage.stage for stage in found.stages if stage.prunable], GRIDS
    if not able:
        raise SearchError(f"nothing can leave this model, so there is nothing to search:\n{found}")
    return Climb(evaluator, _methods(known, names), tokens, able, Counted(report.macs_dense, rows), shown, every)


def _methods(known: Sequence[Method], names: Collection[str] | None) -> list[Method]:
    if names is None:
        return list(known)
    given = [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in given if name not in [m.name for m in known]]:
        listed = ", ".join(repr(m.name) for m in known)
        raise SearchError(f"there is no method {unknown[0]!r} for this model; there are {listed}")
    return [m for m in known if m.name in given or m.name == RANDOM]


def _result(target: Target, winner: Trial, climb: Climb, finalists: Stopwatch) -> SearchResult:
    evaluator = climb.evaluator
    control = next((m for m in climb.methods if m.name == RANDOM), None)
    if control is not None and climb.best(control, winner.target) is None:
        climb.at(control, climb.starts(control)[0], winner.target)
    near = {winner.target, *climb.screened}
    shown = {id(winner)} | {id(t) for macs in near for t in climb.ranked(macs)}
    shown |= {id(t) for t in climb.trials if t.target in near and t.reaches and climb.published(t)}
    timed = {t.schedule: finalists.known(t.schedule) for t in climb.trials}
    rows = {}
    for trial in climb.trials:
        held = None
        if id(trial) in shown:
            climb.bar.say(f"{trial.method.name}, {trial.shape.name}: held-out pictures")
            held = _held(climb, trial)
        rows[id(trial)] = Row(
            trial.method.name,
            trial.shape.name,
            trial.schedule,
            trial.macs,
            *(_numbers(trial.measured)),
            *(_numbers(held)),
            timed[trial.schedule],
            trial.refused,
            trial.method.draws,
        )
    return SearchResult(
        str(target),
        rows[id(winner)],
        tuple(rows.values()),
        evaluator.drift.name,
        climb.dense.macs,
        len(evaluator.pictures["search"]),
        len(evaluator.pictures["held"]),
        min(evaluator.batch, len(evaluator.pictures["search"])),
        _verdict(target, winner, climb, rows[id(winner)]),
        {
            "model": type(evaluator.model).__name__,
            "seed": evaluator.seed,
            "backend": str(finalists.backend),
            "threads": torch.get_num_threads(),
        },
    )


def _held(climb: Climb, trial: Trial) -> Measured:
    return climb.evaluator.measure(trial.schedule, "held", trial.method.draws)


def _numbers(measured: Measured | None) -> tuple[float | None, float | None, float | None]:
    if measured is None:
        return None, None, None
    same = None if measured.agreement is None else float(measured.agreement.mean())
    return measured.mean, measured.error, same


def _verdict(target: Target, winner: Trial, climb: Climb, row: Row) -> str:
    why = "is the fastest of what was timed" if target.drift is not None else "has least drift of what meets the target"
    text = [f"{winner.method.name}, {winner.shape.name}, {why}"]
    control = next((m for m in climb.methods if m.name == RANDOM), None)
    random = climb.best(control, winner.target) if control is not None else None
    if random is None:
        text.append("random selection cannot be had at this cost, so the choice is not held against chance")
    elif random is winner or not _held(climb, winner).below(_held(climb, random)):
        text.append("it is NO BETTER THAN RANDOM selection of the tokens, by the standard error on held-out pictures")
    if target.drift is not None and row.held_drift is not None and row.held_drift > target.drift:
        text.append(f"on held-out pictures drift is {row.held_drift:.4g}, above what was asked")
    return "; ".join(text) + "."
