"""Measuring row by row: what fails costs its row and no other, what does not fit is tried with half the batch."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from bench.gpu.plan import Setting
from bench.tables.results import Results

T = TypeVar("T")
_LONGEST = 300  # characters of a reason


def say(text: str) -> None:
    """A line of progress."""
    print(f"  {text}", file=sys.stderr, flush=True)


def fill_row(results: Results, identity: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> bool:
    """Measures a row unless an earlier run did; an error is noted in the row's column `failed`.

    Returns:
        Whether the row is there.
    """
    if (row := results.row(identity)) and not row["failed"]:
        return True
    say(", ".join(map(str, identity.values())))
    try:
        values = make()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        results.fill(identity, {"failed": reason_of(error)})
    else:
        results.fill(identity, {**values, "failed": ""})
    return not results.row(identity)["failed"]


def fitting(batch: int, run: Callable[[int], T]) -> tuple[T, int]:
    """What `run` gives for a batch size, or for half of it, or a quarter, until it fits into memory; and that size."""
    while True:
        # nothing of a run that failed may live on: an error holds the frames, and they the tensors
        try:
            return run(batch), batch
        except Exception as error:
            if batch == 1 or not out_of_memory(error):
                raise
        forget()
        batch //= 2
        say(f"out of memory; now with a batch of {batch}")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, also where a compiler or cuBLAS says it in its own words."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "alloc_failed" in text


def forget() -> None:
    """Forgets all compiled code, and gives back the memory that it, and models, held."""
    torch.compiler.reset()
    free()


def free() -> None:
    """Gives back memory that nothing reads any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def function(run: Callable[..., T], setting: Setting) -> Callable[..., T]:
    """A function, compiled for the sizes that it is called with; on a CPU by all of torch.compile but Inductor."""
    return torch.compile(run, dynamic=False, backend="inductor" if setting.on_cuda else "aot_eager")


def reason_of(error: BaseException) -> str:
    """The kind of an error and its first words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:_LONGEST].removesuffix(": ")
