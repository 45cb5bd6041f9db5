"""Decoding in worker processes: pieces of a source into batches, failures beside them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from rs_compile.embed.decode import Reader, reason_of
from rs_compile.embed.errors import EmbedError
from rs_compile.embed.sources import Chunk


class Failure(NamedTuple):
    """A picture that was skipped, or the rest of a file, and why."""

    path: str
    reason: str


@dataclass
class Batch:
    """What a worker hands over.

    Args:
        piece: which one it is of.
        names: of the pictures.
        pictures: [len(names), C, H, W]; None where there are none.
        failures: met since the batch before it.
        seconds: that the worker needed.
        last: whether the piece ends here.
    """

    piece: int
    names: list[str] = field(default_factory=list)
    pictures: Tensor | None = None
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    last: bool = False


class Decoded(IterableDataset[Batch]):
    """Batches of pieces; each worker takes its share of the pieces, whole ones."""

    def __init__(self, pieces: Sequence[Chunk], reader: Reader, transform: Callable[[Any], Tensor], batch: int) -> None:
        self._pieces, self._reader, self._transform, self._batch = pieces, reader, transform, batch

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for piece in range(first, len(self._pieces), step):
            yield from self._of_piece(piece)

    def _of_piece(self, piece: int) -> Iterator[Batch]:
        names: list[str] = []
        pictures: list[Tensor] = []
        failures: list[Failure] = []
        started = time.perf_counter()
        for name, result in self._results(self._pieces[piece]):
            if len(names) == self._batch:  # and there is more
                yield Batch(piece, names, _stacked(pictures, names), failures, time.perf_counter() - started)
                names, pictures, failures, started = [], [], [], time.perf_counter()
            if isinstance(result, Tensor):
                names.append(name)
                pictures.append(result)
            else:
                failures.append(Failure(name, result))
        stacked = _stacked(pictures, names) if names else None
        yield Batch(piece, names, stacked, failures, time.perf_counter() - started, last=True)

    def _results(self, entries: Chunk) -> Iterator[tuple[str, Tensor | str]]:
        """Each picture's name, and its tensor or why there is none."""
        for entry in entries:
            try:
                for name, opened in self._reader.pictures(entry):
                    try:
                        yield name, self._transform(opened())
                    except Exception as error:  # whatever a hostile file leads a decoder to
                        yield name, reason_of(error)
            except Exception as error:
                yield entry.path, f"cannot be read, or not to its end: {reason_of(error)}"


def _stacked(pictures: list[Tensor], names: list[str]) -> Tensor:
    for name, picture in zip(names, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            raise EmbedError(
                f"the transform gives {list(pictures[0].shape)} for {names[0]} and {list(picture.shape)} for {name}; "
                "let it resize pictures to one size"
            )
    return torch.stack(pictures)


def default_workers(cuda: bool) -> int:
    """On a GPU a process a core, up to 8; on a CPU half of the cores, as the model computes on them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores) if cuda else max(1, cores // 2)


def loaded(dataset: Decoded, workers: int) -> Iterator[Batch]:
    """The batches, decoded ahead in so many processes; 0 decodes in this one.

    Raises:
        EmbedError: a worker died.
    """
    loader: DataLoader[Batch] = DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    try:
        yield from loader
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error) and "Too many open files" not in str(error):
            raise
        raise EmbedError(
            f"a process that decodes pictures died ({str(error).splitlines()[0]})\n  way out: it may have run out of "
            "memory; ask for fewer workers or smaller batches. What is written stays, and the same command goes on"
        ) from error


def _as_it_is(batch: Any) -> Any:
    return batch
