"""What commands take, for argparse. Torch is not imported: a help text must not wait for it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")
EXPORTS = ("torch.export", "aot-inductor", "onnx", "openvino", "executorch")  # `exporting.formats`'s
FEATURES = ("class", "pooled", "tokens", "output")  # of embed
ENGINES = ("local", "ray")  # of embed
FLOATS = ("float32", "float16")  # in Parquet files
SCHEDULE = "0:0.8,3:0.8,6:0.8"
LAYERS = "1,5,9"  # of score maps
LAYERS_OF_SHIFT, METRICS = ("mlp", "attention", "block"), ("l2", "l1", "cosine")  # `passes.sites.score`'s


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _at_least(text, 1)


def count(text: str) -> int:
    """An integer of at least 0."""
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
    return int(text)


def add_model_options(sub: argparse.ArgumentParser) -> None:
    """Size of the images and number of classes of a timm model."""
    sub.add_argument("--img-size", type=positive, help="side of the images in pixels, the model's own if not given")
    sub.add_argument(
        "--num-classes", type=count, help="of the classifier, 0 for features; the model's own if not given"
    )


def add_schedule(sub: argparse.ArgumentParser, default: str = SCHEDULE) -> None:
    """What is pruned."""
    sub.add_argument(
        "--schedule",
        default=default,
        help=f"block:keep-ratio pairs, a Schedule's JSON, or a .json file of one (default {default})",
    )


def add_dataset(parser: argparse.ArgumentParser, names: Sequence[str], text: str) -> None:
    """Which data set, by the paper's name in letters of any case."""
    by_lower = {name.lower(): name for name in names}

    def read(name: str) -> str:
        if name.lower() not in by_lower:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(names)}")
        return by_lower[name.lower()]

    parser.add_argument("--dataset", type=read, metavar="NAME", help=f"one of {','.join(names)}; {text}")


def add_html(sub: argparse.ArgumentParser) -> None:
    """The result as a page."""
    sub.add_argument("--html", type=Path, metavar="FILE", help="the result as a page, one .html file, as well")


def add_backend(sub: argparse.ArgumentParser, default: str) -> None:
    """What compiles the rewritten graph."""
    sub.add_argument(
        "--backend",
        choices=("inductor", "eager"),
        default=default,
        help=f"eager runs the rewritten graph uncompiled (default {default})",
    )


def add_json(sub: argparse.ArgumentParser) -> None:
    """Where the result goes as JSON."""
    sub.add_argument("--json", metavar="FILE", help="write the result as JSON too; - for stdout instead of the table")
