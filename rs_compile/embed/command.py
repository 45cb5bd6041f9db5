"""`rs-compile embed`: features of a source into a folder of Parquet files, gone on with where it was stopped."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rs_compile.embed.errors import EmbedError
from rs_compile.embed.ray_engine import ray_data, write_by_actors
from rs_compile.embed.run import Embedder, ready
from rs_compile.embed.shards import Folder
from rs_compile.embed.sources import arrow, chunks_of, entries_of
from rs_compile.embed.speed import Speed
from rs_compile.embed.write import shape_of_features, write
from rs_compile.models import built_size, input_size
from rs_compile.schedule import Schedule
from rs_compile.search.pictures import digest
from rs_compile.search.progress import Bar, bar


@dataclass(frozen=True)
class Rank:
    """Which process of how many this is, as `torchrun` says."""

    index: int
    world: int
    local: int

    @classmethod
    def of(cls) -> Rank:
        return cls(
            *(int(os.environ.get(name, least)) for name, least in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        )


@dataclass(frozen=True)
class Embedded:
    """What was done.

    Args:
        folder: with the tables.
        rank: of the process.
        shards: written now, and there before.
        speed: of this run.
        others: files of other kinds in the source; None where it was not listed anew.
    """

    folder: Path
    rank: Rank
    shards: tuple[int, int]
    speed: Speed
    others: int | None

    def __str__(self) -> str:
        written, before = self.shards
        head = f"process {self.rank.index} of {self.rank.world}: " if self.rank.world > 1 else ""
        files = f"{written} file{'s' if written != 1 else ''} written, {before} there before"
        lines = [f"{head}{files}: {self.folder / 'features'}"]
        if written:
            lines.append(str(self.speed))
        if self.speed.skipped:
            lines.append(f"what was skipped, and why: {self.folder / 'skipped'}")
        if self.others:
            lines.append(f"{self.others} files of the source are of other kinds, and were left alone")
        return "\n".join(lines)

    def to_json(self) -> str:
        written, before = self.shards
        rank = {"process": self.rank.index, "processes": self.rank.world}
        return json.dumps(rank | {"files_written": written, "files_before": before} | self.speed.to_dict(), indent=2)


def run(model: nn.Module, args: argparse.Namespace) -> Embedded:
    """Embeds by the command line's arguments; the model on its device and of its dtype.

    Raises:
        EmbedError: see `embed`; or the folder was begun with other settings.
    """
    arrow()
    rank, folder = Rank.of(), Folder(args.output)
    by_ray = args.engine == "ray"
    if by_ray:
        _check_ray(rank)
    elif args.actors or args.address:
        raise EmbedError("--actors and --address are Ray's; write --engine ray beside them")
    schedule, options = Schedule.of(args.schedule), _options(args)
    # Ray's actors compile; here it is tried
    embedder = ready(model, schedule, **(options | {"backend": "eager"} if by_ray else options))
    settings = _settings(model, args)
    speed, others = Speed(embedder.workers), None
    with bar(True, "embed") as shown:
        try:
            if folder.begun:
                folder.check(settings)
            else:
                others = _begin(folder, settings, args, rank, embedder, shown)
            plan = folder.plan()
            own = range(rank.index, len(plan), rank.world)
            left = folder.left(own, args.again)
            if left and by_ray:
                write_by_actors(left, model, schedule, options, folder, settings, args, speed, shown)
            elif left:
                write({i: plan[i] for i in left}, embedder, folder, settings, speed, shown)
        except KeyboardInterrupt:
            print(f"rs-compile: files that are whole stay in {folder.path}; the same command goes on", file=sys.stderr)
            raise
    return Embedded(folder.path, rank, (len(left), len(own) - len(left)), speed, others)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Of `ready`."""
    same = ("features", "batch_size", "workers", "img_size", "every", "backend")
    return {name: getattr(args, name) for name in same} | {"transform": None, "progress": None}


def _check_ray(rank: Rank) -> None:
    ray_data()
    if rank.world > 1:
        raise EmbedError("Ray starts its own actors; run --engine ray without torchrun")


def _begin(
    folder: Folder, settings: dict[str, Any], args: argparse.Namespace, rank: Rank, embedder: Embedder, shown: Bar
) -> int | None:
    """The plan, made by the first process once the model runs: what is refused is not the plan of a later run."""
    if rank.index == 0:
        shown.say(f"listing {args.source}")
        entries, others = entries_of(args.source.absolute(), args.column)
        folder.make()
        shape_of_features(embedder, settings, shown)
        folder.begin(settings, chunks_of(entries, args.shard_size))
        return others
    while not folder.begun:  # torchrun ends this process where the first one fails
        time.sleep(0.2)
    folder.check(settings)
    return None


def _settings(model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for features to compare."""
    return {
        "source": str(args.source.absolute()),
        "model": args.model,
        "weights": digest((k, v.float()) for k, v in model.state_dict().items()),
        "schedule": json.loads(Schedule.of(args.schedule).to_json()),
        "features": args.features,
        "input_size": list(input_size(model, args.img_size or built_size(model))),
        "dtype": args.dtype,
        "store": args.store,
        "every": args.every,
        "column": args.column,
    }
