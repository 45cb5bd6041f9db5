"""Fine-tunes rewritten CNNs with timm's parts: accuracy before pruning, after, and after fine-tuning.

Without --imagenet that is a small ResNet on the handwritten digits, in minutes: pruned line-wise, token-wise, and
left dense, as the control that is trained for as long. With --imagenet DIR it is the paper's ResNet (Table 6), for 100
epochs, 10 of them cooling down. The averaged weights of the last epoch are evaluated; no epoch is chosen by its
accuracy. One process, one device.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tabulate import tabulate
from torch import nn

from bench.evaluate.journal import fingerprint
from bench.training import digits_resnet as digits
from bench.training.checkpoint import read_checkpoint, save_weights
from bench.training.imagenet import imagenet_data
from bench.training.loop import Data, Tick, accuracy, train
from bench.training.recipe import Recipe, TrainingError, add_recipe_arguments, recipe_from
from passes.graph.base import CompileError
from rs_compile import GridPrune, Schedule, models, optimize

METHODS = ("dense", "line", "token")
WHEN = ("dense", "pruned", "finetuned", "finetuned_not_averaged")
IMAGENET_GRID = "0:8x8,1:4x4"  # Table 6


@dataclass(frozen=True)
class Subject:
    """What is fine-tuned.

    Args:
        name: of the model.
        model: dense, on its device; never changed.
        data: to train and evaluate on.
        identity: what decides the numbers besides recipe and method.
    """

    name: str
    model: nn.Module
    data: Data
    identity: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--imagenet", type=Path, metavar="DIR", help="holds train and val; the digits if not given")
    parser.add_argument("--model", default="resnet50", help="timm's name, with --imagenet (default resnet50)")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights (asks its hub)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="start from these weights")
    parser.add_argument("--num-classes", type=int, help="of the model, where they are not its own")
    parser.add_argument("--img-size", type=int, help="side of the images, where it is not the model's own")
    parser.add_argument(
        "--method", action="append", choices=METHODS, help="repeat for more; default all on the digits, else line"
    )
    parser.add_argument(
        "--grid",
        metavar="STAGE:ROWSxCOLUMNS,...",
        help=f"what leaves after which stage; default {digits.GRID} on the digits, else {IMAGENET_GRID}",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="a checkpoint of each method, after every epoch")
    parser.add_argument(
        "--resume", type=Path, action="append", default=[], metavar="FILE", help="go on from a checkpoint; repeat"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows, saved after each method")
    parser.add_argument("--quick", action="store_true", help="two epochs on 320 digits: does every row run?")
    parser.add_argument("--backend", default="eager", help="eager, or inductor, which pays off in long runs only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--workers", type=int, default=4, help="processes that read pictures (default 4)")
    parser.add_argument("--threads", type=int, help="CPU threads, torch's own choice if not given")
    parser.add_argument(
        "--train-dense", type=Path, metavar="FILE", help="instead, train the digits' model from the start, into FILE"
    )
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Fine-tunes by each method in turn, and prints the table.

    Raises:
        TrainingError: options, data or checkpoints that do not fit; says what to do.
    """
    _check(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = _device(args.device)
    if args.train_dense is not None:
        _train_dense(args, device)
        return 0
    schedules = {name: _schedule(name, args) for name in _methods(args)}
    resumed = _resumed(args.resume, schedules)
    checkpoints = _checkpoints(args.output, schedules, resumed)
    recipe = recipe_from(args, _preset(args))
    subject = _imagenet(args, recipe, device) if args.imagenet else _digits(args, recipe, device)
    print(f"{subject.name}, dense: accuracy", file=sys.stderr, flush=True)
    dense = accuracy(subject.model, subject.data.test, device, args.amp)
    rows: list[dict[str, Any]] = []
    for name, schedule in schedules.items():
        try:
            paths = checkpoints.get(name), resumed.get(name)
            rows.append(_row(subject, dense, name, schedule, recipe, args, device, *paths))
        except KeyboardInterrupt:
            print(_way_on(name, list(checkpoints.values())), file=sys.stderr)
            raise
        if args.json is not None:
            content = {"environment": _environment(args), "recipe": asdict(recipe), "rows": rows}
            args.json.write_text(json.dumps(content, indent=2) + "\n")
    print(_table(rows))
    print(_notes(rows, recipe, args))
    return 0


def _row(
    subject: Subject,
    dense: float,
    method: str,
    schedule: Schedule,
    recipe: Recipe,
    args: argparse.Namespace,
    device: torch.device,
    checkpoint: Path | None,
    resume: Path | None,
) -> dict[str, Any]:
    identity = subject.identity | {"method": method, "schedule": json.loads(schedule.to_json())}
    optimized = optimize(copy.deepcopy(subject.model), schedule, backend=args.backend)
    started = time.perf_counter()
    with _progress(f"{subject.name} {method}") as tick:
        trained = train(
            optimized,
            subject.data,
            recipe,
            device=device,
            identity=identity,
            checkpoint=checkpoint,
            resume=resume,
            amp=args.amp,
            tick=tick,
        )
    report = optimized.report()
    return {
        "model": subject.name,
        "method": method,
        "grid": {stage: asdict(cut) for stage, cut in schedule.grid.items()},
        "gflops": report.flops / 1e9,
        "gflops_dense": report.flops_dense / 1e9,
        "accuracy_dense": dense,
        "accuracy_pruned": trained.history[0]["accuracy"],
        "accuracy_finetuned": trained.history[-1]["accuracy"],
        "accuracy_finetuned_not_averaged": trained.last_accuracy,
        "seconds": time.perf_counter() - started,
        "history": trained.history,
    }


def _way_on(method: str, checkpoints: list[Path]) -> str:
    written = " ".join(f"--resume {path}" for path in checkpoints if path.exists())
    if written:
        return f"{method}: interrupted; go on with the same options and {written}"
    if checkpoints:
        return f"{method}: interrupted before an epoch was done; start again"
    return f"{method}: interrupted, nothing was kept; --output DIR keeps a checkpoint of every epoch"


def _digits(args: argparse.Namespace, recipe: Recipe, device: torch.device) -> Subject:
    model = digits.load_digits_resnet().to(device)
    data = digits.digits_data(recipe, args.quick)
    identity = {"data": f"digits{', quick' if args.quick else ''}", "start": fingerprint(model)}
    return Subject("digits ResNet", model, data, identity)


def _imagenet(args: argparse.Namespace, recipe: Recipe, device: torch.device) -> Subject:
    model = models.build(
        args.model, num_classes=args.num_classes, pretrained=args.pretrained, checkpoint=args.checkpoint
    ).to(device)
    size = models.input_size(model, args.img_size)
    with torch.no_grad():
        classes = model(torch.zeros(1, *size, device=device)).shape[-1]
    data = imagenet_data(
        args.imagenet, model, classes, recipe, img_size=args.img_size, workers=args.workers, device=device
    )
    loaders: dict[str, Any] = {"train": data.train, "val": data.test}
    pictures = {name: len(loader.dataset) for name, loader in loaders.items()}
    identity = {"data": {"classes": classes} | pictures, "size": list(size), "start": fingerprint(model)}
    return Subject(args.model, model, data, identity)


def _train_dense(args: argparse.Namespace, device: torch.device) -> None:
    recipe = recipe_from(args, digits.DENSE)
    torch.manual_seed(recipe.seed)
    started = time.perf_counter()
    with _progress("digits ResNet, from the start") as tick:
        trained = train(
            digits.digits_resnet().to(device), digits.digits_data(recipe), recipe, device=device, identity={}, tick=tick
        )
    save_weights(args.train_dense, trained.ema.state_dict(), {"recipe": json.dumps(asdict(recipe))})
    seconds = time.perf_counter() - started
    print(f"test accuracy {trained.history[-1]['accuracy']:.2f}%; {seconds:.0f} s; {args.train_dense}")


def _preset(args: argparse.Namespace) -> Recipe:
    if args.imagenet is not None:
        return Recipe()
    return digits.FINETUNE_QUICK if args.quick else digits.FINETUNE


def _methods(args: argparse.Namespace) -> list[str]:
    if args.method:
        return list(dict.fromkeys(args.method))
    return ["line"] if args.imagenet else list(METHODS)


def _schedule(method: str, args: argparse.Namespace) -> Schedule:
    if method == "dense":
        return Schedule()
    text = args.grid or (IMAGENET_GRID if args.imagenet else digits.GRID)
    grid = {}
    for part in text.split(","):
        stage, _, sizes = part.strip().partition(":")
        rows, _, columns = sizes.partition("x")
        if not (stage.isdecimal() and rows.isdecimal() and columns.isdecimal()):
            raise TrainingError(f"--grid: {part.strip()!r} is not STAGE:ROWSxCOLUMNS; write {IMAGENET_GRID}")
        grid[int(stage)] = GridPrune(int(rows), int(columns), mode="line" if method == "line" else "token")
    return Schedule(grid=grid)


def _resumed(paths: list[Path], schedules: dict[str, Schedule]) -> dict[str, Path]:
    """Which checkpoint is of which method."""
    found = {read_checkpoint(path)["identity"].get("method"): path for path in paths}
    for method, path in found.items():
        if method not in schedules:
            raise TrainingError(f"--resume {path} is of method {method!r}, which is not run; add --method {method}")
    return found


def _checkpoints(output: Path | None, schedules: dict[str, Schedule], resumed: dict[str, Path]) -> dict[str, Path]:
    """Where the checkpoint of each method goes: never over one that is not gone on from."""
    if output is None:
        return {}
    paths = {method: output / f"{method}.pt" for method in schedules}
    for method, path in paths.items():
        if path.exists() and method not in resumed:
            raise TrainingError(
                f"{path} is there already; go on from it with --resume {path}, or give another --output"
            )
    return paths


def _check(args: argparse.Namespace) -> None:
    if args.imagenet is not None and args.quick:
        raise TrainingError("--quick is for the digits; leave out one of --quick and --imagenet")
    if args.imagenet is not None and args.output is None:
        raise TrainingError("--imagenet trains for days; pass --output DIR, where checkpoints go")
    if args.imagenet is not None and not (args.pretrained or args.checkpoint):
        raise TrainingError("fine-tuning starts from trained weights; pass --pretrained, or --checkpoint FILE")
    for option in ("pretrained", "checkpoint", "num_classes", "img_size"):
        if args.imagenet is None and getattr(args, option):
            raise TrainingError(f"--{option.replace('_', '-')} is for --imagenet; the digits' model comes with its own")
    if args.output is not None:
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"--output {args.output}: {error.strerror}; give a folder that can be made") from error
    for option in ("json", "train_dense"):
        path: Path | None = getattr(args, option)
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise TrainingError(f"--{option.replace('_', '-')} {path}: give a file in a directory that exists")


def _device(name: str) -> torch.device:
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise TrainingError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        (
            row["model"],
            row["method"],
            ", ".join(f"{stage}: {cut['rows']}x{cut['columns']}" for stage, cut in row["grid"].items()) or "-",
            f"{row['gflops']:.5f}" if row["gflops_dense"] < 0.1 else f"{row['gflops']:.3f}",
            *(f"{row[f'accuracy_{when}']:.2f}" for when in WHEN),
        )
        for row in rows
    ]
    heads = ("model", "method", "leaves", "GFLOPs", "dense, %", "pruned, %", "fine-tuned, %", "not averaged, %")
    return tabulate(lines, heads, disable_numparse=True, colalign=("left",) * 3 + ("right",) * 5)


def _notes(rows: list[dict[str, Any]], recipe: Recipe, args: argparse.Namespace) -> str:
    seconds = ", ".join(f"{row['method']} {row['seconds']:.0f} s" for row in rows)
    epochs = f"{recipe.all_epochs} epochs each, {recipe.cooldown_epochs} of them cooling down"
    quick = "quick: a part of the digits, two epochs: the numbers mean nothing\n" if args.quick else ""
    return f"{quick}{epochs}; {seconds}; {args.backend}, {args.device}"


def _environment(args: argparse.Namespace) -> dict[str, Any]:
    keys = ("backend", "device", "amp", "quick")
    given = {key: getattr(args, key) for key in keys}
    return given | {"threads": torch.get_num_threads(), "torch": torch.__version__, "timm": timm.__version__}


@contextmanager
def _progress(title: str) -> Iterator[Tick]:
    """A bar on a terminal; elsewhere a line for each epoch."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    told = ""
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title)

        def tick(done: int, every: int, text: str) -> None:
            nonlocal told
            progress.update(task, completed=done, total=every, description=f"{title}, {text}")
            if not console.is_terminal and text != told:
                print(f"{title}, {text}", file=sys.stderr, flush=True)
            told = text

        yield tick


def main(argv: Sequence[str] | None = None) -> int:
    """Until `python -m bench` knows the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.finetune", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except CompileError as error:
        print(f"bench finetune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
