"""What the subcommands of `rs-compile` do. Results on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn

from passes.graph.base import CompileError
from passes.graph.codes import Code
from passes.sites.importance import Shift
from rs_compile import arguments, comparison, doctor, models, timing
from rs_compile.demo import command as demo_command
from rs_compile.embed import command as embed_command
from rs_compile.explain import explain
from rs_compile.exporting import export, info
from rs_compile.exporting.formats import format_of
from rs_compile.optimize import optimize
from rs_compile.pages import check_page
from rs_compile.predict import predict
from rs_compile.schedule import Schedule
from rs_compile.search import command as search_command
from rs_compile.visualize import command as visualize

DTYPES = {name: getattr(torch, name) for name in arguments.DTYPES}


class UsageError(CompileError):
    """An option that cannot be followed on this machine."""

    family = Code.COMMAND


def run(args: argparse.Namespace) -> None:
    """Runs the subcommand that was parsed."""
    check_json(args.json)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns that there is no GPU
    _COMMANDS[args.command](args)


def _demo(args: argparse.Namespace) -> None:
    demo_command.check_outputs(args)
    with _progress(terse=True) as say:
        result = demo_command.run(args, say)
    give(str(result), result.to_json, args.json)


def _explain(args: argparse.Namespace) -> None:
    code = next((code for code in Code if code == args.model.upper()), None)
    if code is not None:
        said = {"code": code.value, "title": code.heading, "meaning": code.meaning, "way out": code.way_out}
        give("\n".join(f"{name}: {text}" for name, text in said.items()), lambda: json.dumps(said), args.json)
        return
    with _progress() as say:
        say(f"building {args.model}")
        model = _model(args)
        inputs = torch.zeros(2, *models.input_size(model, args.img_size))
        say(f"capturing {args.model}")
        result = explain(model, inputs)
    give(str(result), result.to_json, args.json)


def _say_of(say: timing.Say, batch: int, text: str) -> None:
    say(f"batch {batch}: {text}")


def _bench(args: argparse.Namespace) -> None:
    if args.html is not None:
        check_page(args.html, "--html")
    schedule, device = Schedule.of(args.schedule), device_of(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with _progress() as say:
        say(f"building {args.model}")
        model = _model(args).to(device, DTYPES[args.dtype])
        size = models.input_size(model, args.img_size)
        results = []
        for batch in args.batch_size:
            inputs = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
            results.append(
                comparison.compare(
                    model,
                    schedule,
                    inputs.to(device, DTYPES[args.dtype]),
                    rounds=args.rounds,
                    backend=args.backend,
                    say=partial(_say_of, say, batch),
                )
            )
    sweep = comparison.Sweep(tuple(results), args.model)

    def as_json() -> str:
        head = {"model": args.model, "schedule": json.loads(schedule.to_json())}
        return json.dumps(head | sweep.to_dict(), indent=2)

    if args.html is not None:
        sweep.to_html(args.html)
    give(str(sweep), as_json, args.json)


def _run(args: argparse.Namespace) -> None:
    schedule = Schedule.of(args.schedule)
    with _progress() as say:
        say(f"building {args.model}")
        model = _model(args)
        images = models.load_images(args.images, model, args.img_size)
        optimized = optimize(model, schedule, backend=args.backend, progress=say)
        result = predict(model, optimized, [str(path) for path in args.images], images)
    give(str(result), result.to_json, args.json)


def _compare(args: argparse.Namespace) -> None:
    schedule, device = Schedule.of(args.schedule), device_of(args.device)
    if args.html is not None:
        check_page(args.html, "--html")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with _progress() as say:
        say(f"building {args.model}")
        model = _model(args).to(device)
        paths = models.pictures_in(args.images)[: args.limit]
        images = models.load_images(paths, model, args.img_size).to(device)
        fast = optimize(model, schedule, backend=args.backend, progress=say)
        result = fast.compare(images, rounds=args.rounds)
    if args.html is not None:
        result.to_html(args.html)
    give(str(result), result.to_json, args.json)


def _export(args: argparse.Namespace) -> None:
    schedule = Schedule.of(args.schedule)
    format_of(args.output, args.format)  # before the model is built
    weights = "the hub's" if args.pretrained else str(args.checkpoint or "random")
    with _progress() as say:
        say(f"building {args.model}")
        model = _model(args)
        inputs = torch.randn(2, *models.input_size(model, args.img_size), generator=torch.Generator().manual_seed(0))
        say(f"writing {args.output}")
        said = export(
            optimize(model, schedule),
            inputs,
            args.output,
            format=args.format,
            half_weights=args.half_weights,
            name=args.model,
            notes={"weights": weights},
        )
    if weights == "random":
        print("rs-compile: the weights are random; pass --pretrained or --checkpoint FILE", file=sys.stderr)
    give(str(said), said.to_json, args.json)


def _info(args: argparse.Namespace) -> None:
    said = info(args.file)
    give(str(said), said.to_json, args.json)


def _visualize(args: argparse.Namespace) -> None:
    visualize.check_output(args.output)
    schedule = Schedule.of(args.schedule) if args.schedule else Schedule()
    chosen = {k: v for k in ("of", "metric", "with_skip") if (v := getattr(args, k)) is not None}
    if chosen:
        schedule = replace(
            schedule, score=replace(schedule.score, **chosen) if isinstance(schedule.score, Shift) else Shift(**chosen)
        )
    layers = visualize.parse_layers(args.layers or visualize.layers_for(args.output, schedule))
    with _progress() as say:
        say(f"building {args.model}")
        model = _model(args)
        result = visualize.visualize(
            model, args.model, args.images, args.output, layers, schedule, args.img_size, say, args.backend
        )
    give(str(result), result.to_json, args.json)


def _search(args: argparse.Namespace) -> None:
    device = device_of(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    result = search_command.run(_model(args).to(device), args)
    give(str(result), result.to_json, args.json)


def _embed(args: argparse.Namespace) -> None:
    rank = embed_command.Rank.of()
    name = f"cuda:{rank.local}" if args.device == "cuda" and rank.local else args.device
    device = device_of("cpu" if args.engine == "ray" else name)  # Ray's actors have the GPUs
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    result = embed_command.run(_model(args).to(device, DTYPES[args.dtype]), args)
    file = args.json
    if file not in (None, "-") and rank.index:
        file = str(Path(file).with_stem(f"{Path(file).stem}-{rank.index}"))  # a file a process
    give(str(result), result.to_json, file)


def _doctor(args: argparse.Namespace) -> None:
    with _progress() as say:
        result = doctor.look(say)
    give(str(result), result.to_json, args.json)


def _model(args: argparse.Namespace) -> nn.Module:
    return models.build(
        args.model,
        img_size=args.img_size,
        num_classes=args.num_classes,
        pretrained=getattr(args, "pretrained", False),
        checkpoint=getattr(args, "checkpoint", None),
    )


def device_of(name: str) -> torch.device:
    """A device that this machine has.

    Raises:
        UsageError: it has none of that name.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name} is no device; write cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; write cpu")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: write cpu, cuda or cuda:0")
    return device


def check_json(target: str | None) -> None:
    """Before minutes of work, not after them."""
    if target in (None, "-"):
        return
    path = Path(str(target))
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--json {target}: no file can be written there; give one in a directory that exists")


def give(text: str, as_json: Callable[[], str], target: str | None) -> None:
    """Prints a result, as JSON where `target` is "-", and writes that to `target` where it is a file."""
    if target == "-":
        print(as_json())
        return
    print(text)
    if target is not None:
        try:
            Path(target).write_text(as_json() + "\n")
        except OSError as error:
            raise UsageError(f"--json {target}: {error.strerror}; the table above is all there is") from error


@contextmanager
def _progress(terse: bool = False) -> Iterator[timing.Say]:
    """One line with the stage and its seconds, overwritten, on a terminal; elsewhere a line a stage. Always on stderr.

    Args:
        terse: elsewhere, a line for all stages that begin alike, up to a colon.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _first_of_each() if terse else _line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda text: progress.reset(task, description=text)


def _line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _first_of_each() -> timing.Say:
    said: set[str] = set()

    def say(text: str) -> None:
        stage = text.partition(":")[0]
        if stage not in said:
            said.add(stage)
            _line(stage)

    return say


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": _demo,
    "explain": _explain,
    "compare": _compare,
    "doctor": _doctor,
    "bench": _bench,
    "run": _run,
    "search": _search,
    "embed": _embed,
    "visualize": _visualize,
    "export": _export,
    "info": _info,
}
