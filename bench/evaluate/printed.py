"""What the evaluations' commands share: their settings from arguments, and how results are printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate

from bench.evaluate.recall import KS, Found
from rs_compile.schedule import Schedule

DENSE, PRUNED = "dense", "pruned"
RECALL_HEADS = ["model", "way", *(f"R@{k} %" for k in KS)]
Result = tuple[Mapping[str, Any], str, dict[str, Any]]  # scores by method, the table, what else goes into the JSON


def settings(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What all evaluations are given."""
    return {
        "batch_size": args.batch_size,
        "workers": args.workers,
        "device": device,
        "dtype": dtype,
        "limit": args.limit,
    }


def identity(args: argparse.Namespace) -> dict[str, Any]:
    """What the pruned model is."""
    return {"schedule": json.loads(Schedule.of(args.schedule).to_json()), "backend": args.backend}


def about(args: argparse.Namespace) -> dict[str, Any]:
    """`identity` for the JSON."""
    return {**identity(args), "dtype": args.dtype, "random_weights": args.random_weights}


def notes(args: argparse.Namespace) -> list[str]:
    """Lines below a table."""
    return ["random weights: this shows that it runs, not what the model can do"] if args.random_weights else []


def pruning(args: argparse.Namespace) -> str:
    """How the pruned model is pruned, for a title."""
    return f"{args.dtype}; pruned: {str(args.schedule).strip()}"


def table(title: str, rows: Sequence[Sequence[str]], heads: Sequence[str], lines: Sequence[str]) -> str:
    """A table with a title and lines below it."""
    align = ["left" if head in ("model", "way") else "right" for head in heads]
    return "\n".join([title, tabulate(rows, heads, disable_numparse=True, colalign=align), *lines])


def recall_rows(name: str, found: Found) -> list[list[str]]:
    """Both ways and their means, a row each."""
    ways = {
        "text to video": found.text_to_video,
        "video to text": found.video_to_text,
        "arithmetic mean": found.arithmetic,
        "harmonic mean": found.harmonic,
    }
    return [[name, way, *(digits(value, 1) for value in shares.all)] for way, shares in ways.items()]


def digits(value: float | None, count: int) -> str:
    """A number for a table."""
    return "-" if value is None else f"{value:.{count}f}"
