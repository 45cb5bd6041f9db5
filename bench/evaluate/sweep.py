"""The loop that every evaluation shares: read a batch in workers, measure it, note it, show how far it is."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.evaluate.journal import EvaluationError, Notes
from bench.evaluate.ranks import Ranks
from passes.graph.base import CompileError

Read = Callable[[int], Tensor]
Measure = Callable[[list[int], Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Skipped:
    """A file that could not be read, and why in a line."""

    file: str
    reason: str


def skipped_text(skipped: Sequence[Skipped]) -> str:
    """The files that were left out, a line each; empty where there are none."""
    if not skipped:
        return ""
    heading = f"left out, as they could not be read: {len(skipped)}"
    return "\n".join([heading, *(f"  {s.file}: {s.reason}" for s in skipped)])


def spread(count: int, limit: int | None) -> list[int]:
    """`limit` of `count` indices, evenly spaced, so that a few pictures of a sorted folder are of many classes."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def sweep(
    read: Read,
    names: Sequence[str],
    measure: Measure,
    *,
    batch_size: int,
    workers: int,
    journal: Notes,
    ranks: Ranks,
    title: str,
    found_in: tuple[str, Path] | None = None,
) -> tuple[list[dict[str, Any]], tuple[Skipped, ...]]:
    """Measures every item, in batches of consecutive ones.

    The result does not depend on how often the evaluation was interrupted, nor on the number of processes:
    which items are a batch is decided by `batch_size` alone, and results are given in the order of batches.

    Args:
        read: the item of an index, [...], as all have it; runs in a worker. A CompileError skips the item.
        names: what to call the items in messages.
        measure: called with the indices that could be read and their stacked items [n, ...]; what JSON can hold.
        batch_size, workers: of the loader; 0 workers read in this process, and there are no more of them than batches.
        journal: knows the batches that are done, and is told of each that gets done.
        ranks: this process reads and measures its share of the batches.
        title: what stands before the progress bar.
        found_in: what the items are, in words, and their folder, for the message where none can be read.

    Returns:
        What `measure` gave for each batch that had something readable, and what was skipped.

    Raises:
        EvaluationError: no item can be read.
    """
    batches = [list(range(i, min(i + batch_size, len(names)))) for i in range(0, len(names), batch_size)]
    mine = ranks.share([number for number in range(len(batches)) if number not in journal.done])
    loader = DataLoader(
        _Items(read),
        batch_sampler=[batches[number] for number in mine],
        num_workers=min(workers, len(mine)),
        collate_fn=_collate,
        worker_init_fn=_leave_interrupts_to_the_parent,
    )
    added: dict[int, Any] = {}
    try:
        with _bar(f"{title} (resumed)" if journal.done else title, len(mine), ranks) as advance:
            for number, (indices, items, failures) in zip(mine, loader, strict=True):
                value: dict[str, Any] = {"skipped": [[names[i], reason] for i, reason in failures]}
                if indices:
                    value["measured"] = measure(indices, items)
                journal.add(number, value)
                added[number] = value
                advance()
    finally:
        journal.close()
    values = dict(journal.done)
    for part in ranks.gather(added):
        values |= part
    ordered = [values[number] for number in range(len(batches))]
    skipped = tuple(Skipped(*pair) for value in ordered for pair in value["skipped"])
    measured = [value["measured"] for value in ordered if "measured" in value]
    if found_in is not None and not measured:
        what, folder = found_in
        raise EvaluationError(
            f"none of the {len(names)} {what} in {folder} could be read; the first, {skipped[0].file}: "
            f"{skipped[0].reason}"
        )
    return measured, skipped


class _Items(Dataset[Any]):
    def __init__(self, read: Read) -> None:
        self._read = read

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self._read(index)
        except CompileError as error:
            cause = error.__cause__ or error
            text = getattr(cause, "strerror", None) or str(cause)
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return index, lines[0] if lines else type(cause).__name__


def _collate(rows: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor, list[tuple[int, str]]]:
    good = [(index, item) for index, item in rows if isinstance(item, Tensor)]
    failures = [(index, item) for index, item in rows if isinstance(item, str)]
    items = torch.stack([item for _, item in good]) if good else torch.empty(0)
    return [index for index, _ in good], items, failures


def _leave_interrupts_to_the_parent(_: int) -> None:
    # Ctrl-C reaches every process of the terminal; a traceback a worker would bury the message
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _bar(title: str, total: int, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """The batches of the first process, on stderr: a bar on a terminal, elsewhere a line a tenth."""
    if not ranks.first:
        yield lambda: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        done = 0

        def line() -> None:
            nonlocal done
            done += 1
            if done * 10 // total > (done - 1) * 10 // total:
                print(f"{title}: {100 * done // total}%", file=sys.stderr, flush=True)

        yield line
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{title}, the first batch compiles too", total=total)
        yield lambda: progress.update(task, advance=1, description=title)
