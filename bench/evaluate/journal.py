"""The resume file: what an evaluation is of, then a line of JSON for every batch that is done.

A line is appended when its batch is done, so an interruption costs the batches under way and no more; a line
that was cut off in the middle of writing does not count. The file outlives the evaluation: run again, it
gives the result at once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from bench.evaluate.ranks import Ranks
from passes.graph.base import CompileError
from passes.graph.codes import Code

_WAY_OUT = "way out: give another --resume file, or delete this one"


class EvaluationError(CompileError):
    """Data, a model or a resume file that an evaluation cannot go on with; says what to do."""

    family = Code.COMMAND


class Notes(Protocol):
    """What `sweep` asks which batches are done, and tells of those that get done."""

    @property
    def done(self) -> Mapping[int, Any]: ...

    def add(self, batch: int, value: Any) -> None: ...

    def close(self) -> None: ...


class Journal:
    """The resume file at `path`, opened; without a path nothing is kept.

    Every process appends to a file of its own (FILE, FILE.1, FILE.2, ...), and the first one joins them when
    the evaluation is taken up again, whatever the number of processes then.

    Args:
        path: the file; made where there is none.
        identity: what decides the numbers, as JSON can write it: data, models, schedules, dtype, batch size.
        ranks: the processes; all make their Journal at the same point.

    Raises:
        EvaluationError: the file is of another evaluation (it names what differs) or no resume file, or
            nothing can be written there.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any], ranks: Ranks) -> None:
        self._file: TextIO | None = None
        # as it will read when it comes back from a file: tuples are lists, keys are text
        header = json.loads(json.dumps(identity))
        joined: Any = None
        if path is not None and ranks.first:
            try:
                joined = _join(path, header)
            except OSError as error:
                joined = EvaluationError(f"--resume {path}: {error.strerror}; give a file that can be written")
            except EvaluationError as error:
                joined = error
        joined = ranks.broadcast(joined)
        if isinstance(joined, EvaluationError):
            raise joined
        self.done: dict[int, Any] = joined or {}
        """What the batches gave that were done before, by their number; the same in every process."""
        if path is not None:
            own = path if ranks.first else path.with_name(f"{path.name}.{ranks.rank}")
            self._file = own.open("a")
            if not ranks.first:
                self._line({"identity": header})

    def add(self, batch: int, value: Any) -> None:
        """Notes that batch number `batch` is done and gave `value`; on disk when this returns."""
        self._line({"batch": batch, "value": value})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _line(self, content: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps(content) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def _join(path: Path, header: Any) -> dict[int, Any]:
    """Reads the files of all processes and puts what they hold into the first one's."""
    others = [p for p in path.parent.glob(f"{path.name}.*") if p.suffix[1:].isdecimal()]
    done: dict[int, Any] = {}
    for part in filter(Path.exists, (path, *others)):
        done |= _read(part, header)
    lines = [{"identity": header}, *({"batch": batch, "value": done[batch]} for batch in sorted(done))]
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fresh.replace(path)
    for other in others:
        other.unlink()
    return done


def _read(path: Path, header: Any) -> dict[int, Any]:
    try:
        *lines, torn = path.read_text().split("\n")
        if not lines and not json.dumps({"identity": header}).startswith(torn):
            raise ValueError("somebody else's file, which must not be overwritten")
        content = [json.loads(line) for line in lines]
        found = content[0]["identity"] if content else header
        done = {int(line["batch"]): line["value"] for line in content[1:]}
    except (ValueError, KeyError, TypeError, IndexError):
        raise EvaluationError(f"--resume {path} is no resume file of this command\n  {_WAY_OUT}") from None
    if found != header:
        keys = [key for key in {**found, **header} if found.get(key) != header.get(key)]
        differs = "; ".join(f"{key}: {_short(found.get(key))} there, {_short(header.get(key))} here" for key in keys)
        raise EvaluationError(f"--resume {path} is of another evaluation ({differs})\n  {_WAY_OUT}")
    return done


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def as_text(values: Tensor) -> str:
    """A tensor as JSON can hold it, exactly, in float32; its shape is forgotten."""
    return base64.b64encode(values.float().cpu().numpy().tobytes()).decode()


def from_text(text: str) -> Tensor:
    """What `as_text` was given, as float32 [n]."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.float32).copy())


def listing(files: Iterable[tuple[str, Path]]) -> str:
    """A hash of the names and sizes of files; a file that cannot be asked counts as empty."""
    digest = hashlib.sha256()
    for name, path in files:
        size = path.stat().st_size if path.exists() else 0
        digest.update(f"{name}\0{size}\n".encode())
    return digest.hexdigest()[:16]


def fingerprint(model: Any) -> str:
    """A hash of a module's type and weights; of anything else, its name."""
    if not isinstance(model, nn.Module):
        return str(getattr(model, "__qualname__", type(model).__qualname__))
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"{type(model).__name__} {digest.hexdigest()[:16]}"
