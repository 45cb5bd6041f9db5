"""The command line: `rs-compile demo | explain | bench | run | visualize`. Results on stdout, progress on stderr.

Exit codes: 0 done, 2 something that the user can mend (the message says how), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn

from passes.graph.base import CompileError
from passes.sites.score import Metric, Operation
from rs_compile import comparison, demo, models, timing
from rs_compile.arguments import count, positive
from rs_compile.explain import explain
from rs_compile.optimize import optimize
from rs_compile.predict import predict
from rs_compile.schedule import Schedule
from rs_compile.visualize import command as visualize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEDULE = "0:0.8,3:0.8,6:0.8"
BATCHES = (1, 4, 16, 64)


class UsageError(CompileError):
    """An option that cannot be followed on this machine."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = args.command
    try:
        _check_json(args.json)
        command(args)
    except CompileError as error:
        print(f"rs-compile: {error}", file=sys.stderr)
        return 2
    except (torch._dynamo.exc.BackendCompilerFailed, torch._inductor.exc.InductorError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        print(
            f"rs-compile: torch.compile's backend failed: {first}\n  way out: Inductor needs a C++ compiler "
            "(and Triton on a GPU); install one, or pass --backend eager",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("rs-compile: interrupted", file=sys.stderr)
        return 130
    return 0


def _demo(args: argparse.Namespace) -> None:
    try:
        with _progress() as say:
            result = demo.run(args.backend, args.quick, say)
    except ImportError as error:
        raise UsageError(str(error)) from error
    _give(str(result), result.to_json, args.json)


def _explain(args: argparse.Namespace) -> None:
    with _progress() as say:
        say(f"building {args.model}")
        model = _model(args)
        inputs = torch.zeros(2, *models.input_size(model, args.img_size))
        say(f"capturing {args.model}")
        result = explain(model, inputs)
    _give(str(result), result.to_json, args.json)


def _say_of(say: timing.Say, batch: int, text: str) -> None:
    say(f"batch {batch}: {text}")


def _bench(args: argparse.Namespace) -> None:
    schedule, device = _schedule(args.schedule), _device(args.device)
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
    sweep = comparison.Sweep(tuple(results))

    def as_json() -> str:
        head = {"model": args.model, "schedule": json.loads(schedule.to_json())}
        return json.dumps(head | sweep.to_dict(), indent=2)

    _give(str(sweep), as_json, args.json)


def _run(args: argparse.Namespace) -> None:
    schedule = _schedule(args.schedule)
    with _progress() as say:
        say(f"building {args.model}")
        model = _model(args)
        images = models.load_images(args.images, model, args.img_size)
        optimized = optimize(model, schedule, backend=args.backend, progress=say)
        result = predict(model, optimized, [str(path) for path in args.images], images)
    _give(str(result), result.to_json, args.json)


def _visualize(args: argparse.Namespace) -> None:
    visualize.check_output(args.output)
    layers = visualize.parse_layers(args.layers)
    schedule = _schedule(args.schedule) if args.schedule else Schedule()
    chosen = {k: v for k in ("operation", "metric", "with_skip") if (v := getattr(args, k)) is not None}
    schedule = replace(schedule, **chosen)
    with _progress() as say:
        say(f"building {args.model}")
        model = _model(args)
        result = visualize.visualize(model, args.model, args.images, args.output, layers, schedule, args.img_size, say)
    _give(str(result), result.to_json, args.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rs-compile", description="Faster pretrained vision models, without training."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    sub = add("demo", _demo, "Prune a small digits ViT: accuracy and speed, no download.")
    _add_backend(sub, "inductor")
    sub.add_argument("--quick", action="store_true", help="one schedule, few rounds")
    _add_json(sub)

    sub = add("explain", _explain, "Where tokens could leave a timm model, and where not and why.")
    sub.add_argument("model", metavar="MODEL", help="timm's name for it")
    _add_model_options(sub)
    sub.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON instead of the table; with FILE, beside it"
    )

    sub = add("bench", _bench, "Time a pruned timm model against torch.compile(model), interleaved.")
    sub.add_argument("model", metavar="MODEL", help="timm's name for it; its weights do not matter here")
    _add_model_options(sub)
    _add_schedule(sub)
    sub.add_argument(
        "--batch-size", type=positive, nargs="+", metavar="N", default=BATCHES, help="one or more (default 1 4 16 64)"
    )
    sub.add_argument("--dtype", choices=DTYPES, default="float32")
    sub.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0")
    sub.add_argument("--threads", type=positive, help="CPU threads, torch's own choice if not given")
    sub.add_argument("--rounds", type=positive, default=15, help="of all variants, interleaved")
    _add_backend(sub, "inductor")
    _add_json(sub)

    sub = add("run", _run, "Classify images with a timm model, dense and pruned side by side.")
    _add_images(sub)
    _add_model_options(sub)
    _add_schedule(sub)
    _add_backend(sub, "eager")
    _add_json(sub)

    text = (
        "Draw score maps over images beside the attention, and which patches a schedule leaves; images as the model "
        "sees them, resized and cropped, and each map in its own colours, from its lowest score to one that 2% reach."
    )
    sub = add("visualize", _visualize, text)
    _add_images(sub)
    _add_model_options(sub)
    sub.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help=".png for a picture, .html for a page"
    )
    sub.add_argument(
        "--layers",
        default=visualize.LAYERS,
        metavar="N,N,..",
        help="blocks, or stages of a CNN, counted from 0 as in schedules and in `explain`: 1 is the second; or all "
        f"(default {visualize.LAYERS})",
    )
    sub.add_argument("--schedule", help="show which patches it leaves: block:keep-ratio pairs, or a Schedule's JSON")
    sub.add_argument("--operation", choices=get_args(Operation), help="whose shift, of maps and schedule (default mlp)")
    sub.add_argument("--metric", choices=get_args(Metric), help="the distance (default l2)")
    sub.add_argument("--with-skip", action="store_const", const=True, help="compare x + F(x), not F(x), with x")
    _add_json(sub)
    return parser


def _add_images(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("images", metavar="IMAGE", nargs="+", type=Path)
    sub.add_argument("--model", required=True, help="timm's name for it")
    weights = sub.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="local .safetensors, .pth or .pt weights")
    weights.add_argument("--pretrained", action="store_true", help="weights from timm's hub, or its cache")


def _add_model_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--img-size", type=positive, help="side of the images in pixels, the model's own if not given")
    sub.add_argument(
        "--num-classes", type=count, help="of the classifier, 0 for features; the model's own if not given"
    )


def _add_schedule(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--schedule",
        default=SCHEDULE,
        help=f"block:keep-ratio pairs, or a Schedule's JSON for other scores (default {SCHEDULE})",
    )


def _add_backend(sub: argparse.ArgumentParser, default: str) -> None:
    sub.add_argument(
        "--backend",
        choices=("inductor", "eager"),
        default=default,
        help=f"eager runs the rewritten graph uncompiled (default {default})",
    )


def _add_json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", metavar="FILE", help="write the result as JSON too; - for stdout instead of the table")


def _model(args: argparse.Namespace) -> nn.Module:
    return models.build(
        args.model,
        img_size=args.img_size,
        num_classes=args.num_classes,
        pretrained=getattr(args, "pretrained", False),
        checkpoint=getattr(args, "checkpoint", None),
    )


def _schedule(text: str) -> Schedule:
    return Schedule.from_json(text) if text.lstrip().startswith("{") else Schedule.parse(text)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name} is no device; write cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; write cpu")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: write cpu, cuda or cuda:0")
    return device


def _check_json(target: str | None) -> None:
    """Before minutes of work, not after them."""
    if target in (None, "-"):
        return
    path = Path(str(target))
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--json {target}: no file can be written there; give one in a directory that exists")


def _give(text: str, as_json: Callable[[], str], target: str | None) -> None:
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
def _progress() -> Iterator[timing.Say]:
    """A spinner with the stage and its seconds on a terminal; elsewhere a line a stage. Always on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda text: progress.reset(task, description=text)


if __name__ == "__main__":
    sys.exit(main())
