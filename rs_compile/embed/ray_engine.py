"""`--engine ray`: each file of features is a task of Ray Data, run by a pool of actors that hold the model."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passes.graph.base import CompileError
from passes.graph.codes import Code
from rs_compile.embed.errors import EmbedError
from rs_compile.embed.run import ready
from rs_compile.embed.shards import Folder
from rs_compile.embed.speed import Speed
from rs_compile.embed.write import Shown, Silent, write
from rs_compile.schedule import Schedule

_ATTEMPTS = 3  # at a file; Ray would start actors anew without end


def ray_data() -> Any:
    """Ray, with its Data library.

    Raises:
        EmbedError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent unless asked
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EmbedError(f"--engine ray needs Ray ({error}); pip install 'ray[data]'", code=Code.MISSING) from error
    return ray


def write_by_actors(
    chunks: Sequence[int],
    model: nn.Module,
    schedule: Schedule,
    options: dict[str, Any],
    folder: Folder,
    settings: dict[str, Any],
    args: argparse.Namespace,
    speed: Speed,
    shown: Shown,
) -> None:
    """Writes the files of these chunks by actors; one that dies is started again, and its file with it.

    Args:
        chunks: their numbers in the folder's plan.
        model: copied into each actor, on the device that Ray gives it.
        schedule, options: see `rs_compile.embed.run.ready`.
        folder, settings: see `write`.
        args: of the command line: address, actors, device, threads.
        speed: gets the pictures counted; the rates are those of the actors together.

    Raises:
        EmbedError: what an actor refused, or a file whose actors died again and again.
    """
    ray = ray_data()
    with _cluster(ray, args.address) as found:
        count, each = _actors(found, args)
        speed.processes = min(count, len(chunks))
        shown.say(f"starting {speed.processes} actors")
        rows = ray.data.from_items([{"chunk": i} for i in chunks], override_num_blocks=len(chunks))
        done = rows.map_batches(
            Actor,
            fn_constructor_args=(model.cpu(), schedule, options, folder.path.absolute(), settings, args.threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=speed.processes),
            **each,
        )
        shown.expect(len(chunks))
        try:
            for row in done.iter_rows():
                if row["refused"]:
                    raise EmbedError(row["refused"])
                speed.add(Speed(**json.loads(row["speed"])))
                shown.step()
                shown.say(f"{speed.pictures} pictures, {speed.skipped} skipped")
        except ray.exceptions.RayError as error:
            raise _refused(error) from error
    if left := folder.left(chunks):  # also clears what killed actors left
        raise EmbedError(f"{len(left)} files are missing though Ray says that all is done; the same command goes on")


class Actor:
    """Holds the model; writes the files of the chunks that it is given."""

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        options: dict[str, Any],
        path: Path,
        settings: dict[str, Any],
        threads: int | None,
    ) -> None:
        import ray

        torch.set_num_threads(threads or int(os.environ.get("OMP_NUM_THREADS", 1)))  # Ray sets it to its cores
        on = "cuda" if ray.get_gpu_ids() else "cpu"
        self._embedder = ready(model.to(on), schedule, **options)
        self._folder, self._settings = Folder(path), settings
        self._plan = self._folder.plan()

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """One chunk; what is refused is told, not raised: Ray would wrap it."""
        [chunk] = map(int, rows["chunk"])
        speed, refused = Speed(self._embedder.workers), ""
        try:
            if self._folder.attempt(chunk) >= _ATTEMPTS:
                first = self._plan[chunk][0].path
                raise EmbedError(
                    f"{_ATTEMPTS} actors died at the files from {first} on; one of them may kill its reader"
                )
            write({chunk: self._plan[chunk]}, self._embedder, self._folder, self._settings, speed, Silent())
        except CompileError as error:
            refused = error.text
        return {"speed": [json.dumps(asdict(speed))], "refused": [refused]}


@contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[dict[str, float]]:
    """What a cluster has, of this process if there is none: "CPU" and "GPU"."""
    try:
        ray.init(address=address, include_dashboard=None if address else False, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EmbedError(f"--address {address}: Ray cannot be reached there ({error})") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _actors(found: dict[str, float], args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """How many actors, and what each asks Ray for."""
    on_gpu = args.device.startswith("cuda")
    have = int(found.get("GPU" if on_gpu else "CPU", 0))
    count = args.actors or (have if on_gpu else 1)
    if count > have or not have:
        raise EmbedError(
            f"{count or 'some'} actors on {'GPUs' if on_gpu else 'CPU cores'}, of which Ray has {have}; "
            "ask for fewer (--actors), or join a larger cluster (--address)"
        )
    return count, {"num_gpus": 1.0, "num_cpus": 1.0} if on_gpu else {"num_cpus": float(have // count)}


def _refused(error: Exception) -> EmbedError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return EmbedError(
        f"Ray could not finish ({lines[-1] if lines else type(error).__name__})\n  way out: an actor may lack memory; "
        "ask for fewer --actors or a smaller --batch-size. What is written stays, and the same command goes on"
    )
