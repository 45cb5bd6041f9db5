"""One entry into pictures: files, rows of a Parquet file, members of a tar, frames of a video."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from passes.graph.base import CompileError
from rs_compile.embed.errors import EmbedError
from rs_compile.embed.sources import PICTURES, Entry, arrow
from rs_compile.models import read_image

Open = Callable[[], Image.Image]


@dataclass(frozen=True)
class Reader:
    """Opens what entries hold.

    Args:
        colours: PIL's mode of the pictures, "RGB" or "L".
        every: of a video's frames, the first of each so many.
    """

    colours: str = "RGB"
    every: int = 1

    def pictures(self, entry: Entry) -> Iterator[tuple[str, Open]]:
        """Names, and what decodes each; either may raise, then the rest of the entry cannot be read."""
        if entry.kind == "picture":
            yield entry.path, partial(read_image, Path(entry.path), self.colours)
        elif entry.kind == "rows":
            yield from self._rows(entry)
        elif entry.kind == "tar":
            yield from self._members(entry.path)
        else:
            yield from self._frames(entry.path)

    def _encoded(self, content: bytes | None) -> Image.Image:
        if content is None:
            raise EmbedError("the row has no picture")
        return read_image(io.BytesIO(content), self.colours)

    def _rows(self, entry: Entry) -> Iterator[tuple[str, Open]]:
        _, pq = arrow()
        with pq.ParquetFile(entry.path) as file:
            row = sum(file.metadata.row_group(i).num_rows for i in range(entry.group))
            for batch in file.iter_batches(64, [entry.group], [entry.column], use_threads=False):
                for value in batch.column(0):
                    name, cell = f"{entry.path}#{row}", value.as_py()
                    row += 1
                    if isinstance(cell, dict):
                        if cell["bytes"] is None and cell.get("path"):
                            beside = Path(os.path.dirname(entry.path), cell["path"])
                            yield name, partial(read_image, beside, self.colours)
                            continue
                        cell = cell["bytes"]
                    yield name, partial(self._encoded, cell)

    def _members(self, path: str) -> Iterator[tuple[str, Open]]:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.lower().endswith(PICTURES) else None
                if file is not None:
                    yield f"{path}#{member.name}", partial(self._encoded, file.read())

    def _frames(self, path: str) -> Iterator[tuple[str, Open]]:
        import av

        with av.open(path) as container:
            if not container.streams.video:
                raise EmbedError("the file has no video stream")
            for i, frame in enumerate(container.decode(video=0)):
                if i % self.every == 0:
                    yield f"{path}#{i}", partial(_converted, frame.to_image, self.colours)


def _converted(image: Open, colours: str) -> Image.Image:
    return image().convert(colours)


def reason_of(error: BaseException) -> str:
    """One line for the table of what was skipped."""
    cause = error.__cause__ or error
    if isinstance(cause, UnidentifiedImageError):
        return "no picture in a format that Pillow reads"
    text = cause.text if isinstance(cause, CompileError) else getattr(cause, "strerror", None) or str(cause)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(cause).__name__
