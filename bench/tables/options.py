"""The options that all tables and figures share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.tables.results import UsageError
from bench.tables.subjects import Subject
from rs_compile.arguments import DTYPES as FLOATS
from rs_compile.arguments import add_dataset, count, positive
from rs_compile.commands import DTYPES

COLUMNS = ("gflops", "throughput", "accuracy")
QUICK_ROUNDS = 2
RETRIEVAL = ("MSRVTT", "MSVD", "ActivityNet", "DiDeMo", "LSMDC", "SSV2-label", "SSV2-template")
WHOLE_UMT = ("annotations", "answers")  # data that UMT is evaluated on with its text side


def add_arguments(parser: argparse.ArgumentParser, columns: Sequence[str] = COLUMNS, rounds: int = 7) -> None:
    """The options that all tables and figures have.

    Args:
        parser: of the command.
        columns: those measured unless the user says otherwise.
        rounds: of timing.
    """
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, saved as they are measured; a rerun goes on")
    parser.add_argument("--quick", action="store_true", help="small stand-ins, uncompiled: does every row run?")
    names = ",".join(columns)
    parser.add_argument("--columns", type=chosen(columns), default=list(columns), help=f"some of {names}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 (default cpu)")
    parser.add_argument("--dtype", choices=FLOATS, default="float32")
    parser.add_argument(
        "--batch-size", type=positive, help="of timing and evaluation; the paper's on a GPU if not given"
    )
    parser.add_argument("--rounds", type=positive, help=f"of timing, all methods in each (default {rounds})")
    parser.add_argument("--threads", type=positive, help="CPU threads, torch's own choice if not given")
    parser.add_argument("--backend", choices=("inductor", "eager"), help="default inductor; with --quick eager")
    parser.add_argument(
        "--baseline-eager-everywhere",
        action="store_true",
        help="attention-score pruning writes out the attention of every block, as published, not only of scored blocks",
    )
    parser.set_defaults(default_rounds=rounds)


def chosen(known: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: reads comma-separated names, each of them known."""

    def read(text: str) -> list[str]:
        names = list(dict.fromkeys(name.strip() for name in text.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return read


def add_data_arguments(
    parser: argparse.ArgumentParser, images: bool = False, videos: bool = False, datasets: Sequence[str] = RETRIEVAL
) -> None:
    """The options of accuracy on pictures or videos; without any of them it is the digits'.

    Args:
        datasets: of videos, by the paper's names.
    """
    if images:
        parser.add_argument("--imagenet", type=Path, metavar="DIR", help="a folder a class, or unlabelled pictures")
    if videos:
        _add_video_arguments(parser, datasets)
    parser.add_argument(
        "--checkpoint",
        type=_named_file,
        action="append",
        default=[],
        metavar="MODEL=FILE",
        help="weights of a model of the table; if not given DeiT has timm's pretrained ones, UMT random ones",
    )
    parser.add_argument("--workers", type=count, default=4, help="processes that read files (default 4)")
    parser.add_argument("--limit", type=positive, help="so many files at most")


def check_umt(args: argparse.Namespace, subject: Subject) -> None:
    """Raises UsageError where UMT's accuracy is wanted and something for it is not given."""
    if subject.data not in WHOLE_UMT or args.annotations is None:
        return
    name = subject.name
    if args.dataset is None:
        raise UsageError("--annotations needs --dataset NAME, which says how they are read")
    if subject.data == "answers" and args.answers is None:
        raise UsageError("--annotations needs --answers FILE, the list of all candidate answers")
    if name not in dict(args.text_config):
        raise UsageError(f"{name} reads texts; pass --text-config {name}=DIR, or leave {name} out")
    if name not in dict(args.checkpoint) and not args.quick:
        raise UsageError(f"without its weights {name} finds nothing; pass --checkpoint {name}=FILE")


def _add_video_arguments(parser: argparse.ArgumentParser, datasets: Sequence[str]) -> None:
    parser.add_argument("--videos", type=Path, metavar="DIR", help="video files")
    add_dataset(parser, datasets, "for UMT: that of --videos; whose figures of the paper are shown")
    parser.add_argument(
        "--annotations", type=Path, metavar="FILE", help="for UMT: the test file of --dataset, as VindLU released it"
    )
    parser.add_argument(
        "--text-config",
        type=_named_file,
        action="append",
        default=[],
        metavar="MODEL=DIR",
        help="for UMT: bert-base-uncased's folder (UMT-B) or bert-large-uncased's (UMT-L), or one with its vocab.txt",
    )


@dataclass(frozen=True)
class Setting:
    """How to measure: the options, understood."""

    columns: list[str]
    quick: bool
    backend: str
    device: torch.device
    dtype: torch.dtype
    batch_size: int | None
    rounds: int
    json: Path | None
    eager_everywhere: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> Setting:
        """Raises UsageError where the machine cannot do it, or data is not there; before minutes of work."""
        folders = [(option, getattr(args, option, None)) for option in ("imagenet", "videos")]
        for option, folder in [*folders, *(("text-config", folder) for _, folder in getattr(args, "text_config", ()))]:
            if folder is not None and not folder.is_dir():
                raise UsageError(f"--{option} {folder}: there is no such folder")
        files = [getattr(args, option, None) for option in ("captions", "annotations", "answers")]
        if (getattr(args, "videos", None) is None) != all(file is None for file in files):
            known = [f"--{option}" for option in ("captions", "annotations") if hasattr(args, option)]
            raise UsageError(f"--videos DIR goes with {' or '.join(known)} FILE, which says what is to be seen in them")
        files += [file for _, file in getattr(args, "checkpoint", ())]
        if absent := [file for file in files if file is not None and not file.is_file()]:
            raise UsageError(f"there is no file {absent[0]}")
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        return cls(
            args.columns,
            args.quick,
            args.backend or ("eager" if args.quick else "inductor"),
            usable(args.device),
            DTYPES[args.dtype],
            args.batch_size,
            args.rounds or (QUICK_ROUNDS if args.quick else args.default_rounds),
            args.json,
            args.baseline_eager_everywhere,
        )

    def describe(self) -> str:
        """Where and in which dtype."""
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}{threads}"

    def batch(self, subject: Subject) -> int:
        """Samples of a timed call."""
        on_cpu, elsewhere = subject.batch
        return self.batch_size or (on_cpu if self.device.type == "cpu" else elsewhere)


def _named_file(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL=FILE, like DeiT-S=deit_small.pth")
    return name, Path(path)


def usable(name: str) -> torch.device:
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise UsageError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
