"""`rs-compile search`: the search on a folder of pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torch import nn

from rs_compile.pages import check_page
from rs_compile.search import plot
from rs_compile.search.pictures import SearchError, read
from rs_compile.search.result import SearchResult
from rs_compile.search.run import search
from rs_compile.search.targets import Target


def run(model: nn.Module, args: argparse.Namespace) -> SearchResult:
    """Searches by the command line's arguments; writes the schedule, the picture and the page where asked.

    Raises:
        SearchError: see `search`; or a file cannot be written, before any long work.
    """
    Target(args.speedup, args.macs, args.drift)
    if args.output is not None:
        _check_output(args.output)
    if args.plot is not None:
        plot.check(args.plot)
    if args.html is not None:
        check_page(args.html, "--html")
    try:
        result = _searched(model, args)
    except KeyboardInterrupt:
        if args.resume is not None:
            print(f"rs-compile: what was found is in {args.resume}; the same command goes on from it", file=sys.stderr)
        raise
    if args.output is not None:
        args.output.write_text(result.schedule.to_json() + "\n")
    if args.plot is not None:
        result.plot(args.plot)
    if args.html is not None:
        result.to_html(args.html)
    return result


def _searched(model: nn.Module, args: argparse.Namespace) -> SearchResult:
    return search(
        model,
        read(args.images, model, args.limit, args.seed, size=args.img_size).tensors[""],
        speedup=args.speedup,
        macs=args.macs,
        drift=args.drift,
        metric=args.metric,
        methods=args.methods,
        limit=args.limit,
        batch_size=args.batch_size,
        seed=args.seed,
        backend=args.backend,
        resume=args.resume,
    )


def _check_output(path: Path) -> None:
    if path.suffix != ".json" or path.is_dir() or not path.absolute().parent.is_dir():
        raise SearchError(f"-o {path}: no schedule can be written there; give a .json file in a folder that exists")
