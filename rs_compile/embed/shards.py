"""Features as Parquet files, one a chunk of the source: each appears whole or not at all, so a killed run can go on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rs_compile.embed.errors import EmbedError
from rs_compile.embed.loader import Failure
from rs_compile.embed.sources import Chunk, Entry, arrow

_HELD = 16 << 20  # bytes of features kept back until they are a row group
_PARTIAL = ".partial-"


class Folder:
    """Where features go: `features/`, a table of (path, features); `skipped/`, one of (path, reason); the plan.

    A chunk is done once its file in `features/` is there. The plan is fixed by the first run: a source that changes
    later does not move pictures from one chunk to another.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.features, self.skipped = path, path / "features", path / "skipped"
        self._settings, self._plan = path / "embed.json", path / "plan.json"

    @property
    def begun(self) -> bool:
        """Whether there is a plan."""
        return self._settings.is_file()

    def make(self) -> None:
        """The folder itself, before long work.

        Raises:
            EmbedError: it cannot be made, or holds something else.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            left = [p.name for p in self.path.iterdir()]
        except OSError as error:
            raise EmbedError(f"{self.path} cannot be made ({error.strerror}); give another folder with -o") from error
        if other := next((name for name in left if not name.startswith((_PARTIAL, self._plan.name))), None):
            raise EmbedError(f"{self.path} holds other files ({other}); give a new or empty folder with -o")

    def begin(self, settings: Mapping[str, Any], chunks: Sequence[Chunk]) -> None:
        """Writes the plan; what `begun` looks for is written last.

        Raises:
            EmbedError: the folder cannot be written.
        """
        try:
            _write(self._plan, json.dumps(chunks))
            _write(self._settings, json.dumps(settings, indent=2) + "\n")
        except OSError as error:
            raise EmbedError(
                f"{self.path} cannot be written ({error.strerror}); give another folder with -o"
            ) from error

    def settings(self) -> dict[str, Any]:
        """Those of the run that began it."""
        try:
            found: dict[str, Any] = json.loads(self._settings.read_text())
        except ValueError as error:
            raise EmbedError(f"{self._settings} is not what embed writes; give another folder with -o") from error
        return found

    def check(self, settings: Mapping[str, Any]) -> None:
        """That features of a run with these settings compare with those that are there.

        Raises:
            EmbedError: the folder was begun with other settings, by which its features would not compare.
        """
        begun = self.settings()
        unlike = [f"{k}: {begun.get(k)!r}, now {v!r}" for k, v in settings.items() if begun.get(k) != v]
        if unlike:
            raise EmbedError(
                f"{self.path} was begun with other settings ({'; '.join(unlike)}); give these again to go on, "
                "or another folder with -o"
            )

    def plan(self) -> list[Chunk]:
        """The chunks."""
        return [tuple(Entry(*entry) for entry in chunk) for chunk in json.loads(self._plan.read_text())]

    def part(self, chunk: int) -> Path:
        return self.features / f"part-{chunk:06}.parquet"

    def skipped_part(self, chunk: int) -> Path:
        return self.skipped / f"part-{chunk:06}.parquet"

    def attempt(self, chunk: int) -> int:
        """Notes that this process begins a chunk; how many did that before, and died."""
        own = _beside(self.part(chunk), chunk)
        before = len(set(self.features.glob(f"{_PARTIAL}{chunk:06}-*")) - {own})
        own.touch()
        return before

    def left(self, chunks: Sequence[int], again: bool = False) -> list[int]:
        """Those of these chunks that are not done; clears what a killed run left of them.

        Args:
            chunks: that this process is responsible for.
            again: do those once more that skipped something.
        """
        for folder in (self.features, self.skipped):
            folder.mkdir(exist_ok=True)
            for partial in list(folder.glob(f"{_PARTIAL}*")):
                if int(partial.name.removeprefix(_PARTIAL).partition("-")[0]) in chunks:
                    partial.unlink()
        if again:
            for chunk in chunks:
                if self.skipped_part(chunk).exists():
                    self.part(chunk).unlink(missing_ok=True)
        return [chunk for chunk in chunks if not self.part(chunk).exists()]


class Shard:
    """The file of one chunk while it grows.

    Args:
        folder: where it goes.
        chunk: its number.
        shape: of one picture's features, [C] or [N, C].
        half: store float16, not float32.
        note: for the file's metadata.
    """

    def __init__(self, folder: Folder, chunk: int, shape: Sequence[int], half: bool, note: str = "") -> None:
        pa, pq = arrow()
        self._folder, self._chunk, self._half = folder, chunk, half
        cell = pa.float16() if half else pa.float32()
        for size in reversed(shape):
            cell = pa.list_(cell, size)
        self._schema = pa.schema([("path", pa.string()), ("features", cell)], metadata={"rs_compile": note})
        self._partial = _beside(folder.part(chunk), chunk)
        self._writer = pq.ParquetWriter(self._partial, self._schema, use_dictionary=False)
        self._names: list[str] = []
        self._features: list[Tensor] = []
        self._failures: list[Failure] = []
        self._bytes = 0

    def add(self, names: Sequence[str], features: Tensor | None, failures: Sequence[Failure]) -> None:
        """Pictures [len(names), ...] and what was skipped beside them.

        Raises:
            EmbedError: float16 cannot hold the features.
        """
        self._failures += [Failure(_utf8(f.path), _utf8(f.reason)) for f in failures]
        if features is None or not names:
            return
        stored = features.to(torch.float16 if self._half else torch.float32)
        if self._half and not bool(stored.isfinite().all()):
            raise EmbedError(
                f"features of {names[0]} or one behind it are up to {features.abs().max():.3g}, beyond "
                "what float16 holds (65504); give another folder with -o, and --store float32"
            )
        self._names += map(_utf8, names)
        self._features.append(stored)
        self._bytes += stored.nbytes
        if self._bytes >= _HELD:
            self._flush()

    def finish(self) -> None:
        """The file takes its name, after that of what was skipped."""
        pa, pq = arrow()
        self._flush()
        self._writer.close()
        _synced(self._partial)
        target = self._folder.skipped_part(self._chunk)
        if self._failures:
            partial = _beside(target, self._chunk)
            columns = [[f.path for f in self._failures], [f.reason for f in self._failures]]
            pq.write_table(pa.table(columns, names=["path", "reason"]), partial)
            _synced(partial)
            os.replace(partial, target)
        else:
            target.unlink(missing_ok=True)  # of a run before, killed between the two files
        os.replace(self._partial, self._folder.part(self._chunk))

    def drop(self) -> None:
        """Leaves nothing of it."""
        with contextlib.suppress(OSError):  # a full disk, which has been told of
            self._writer.close()
        self._partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._names:
            return
        pa, _ = arrow()
        features = torch.cat(self._features)
        cells = pa.array(features.flatten().numpy())
        for size in reversed(features.shape[1:]):
            cells = pa.FixedSizeListArray.from_arrays(cells, size)
        columns = [pa.array(self._names, pa.string()), cells.cast(self._schema.field(1).type)]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._names, self._features, self._bytes = [], [], 0


def _beside(target: Path, chunk: int) -> Path:
    # by process, so that two runs at once waste work and spoil nothing; readers of folders pass names with a dot
    return target.parent / f"{_PARTIAL}{chunk:06}-{os.getpid()}"


def _utf8(name: str) -> str:
    # a file's name may be any bytes, which Parquet's strings are not
    return name.encode("utf-8", "backslashreplace").decode()


def _synced(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{_PARTIAL}{path.name}-{os.getpid()}")
    partial.write_text(text)
    _synced(partial)
    os.replace(partial, path)
