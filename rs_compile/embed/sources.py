"""What a source is made of: entries (a picture, a video, a tar, some rows of a Parquet file), and chunks of entries."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from passes.graph.codes import Code
from rs_compile.embed.errors import EmbedError

Kind = Literal["picture", "video", "tar", "rows"]
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
TARS = (".tar", ".tar.gz", ".tgz")
PARQUET = (".parquet",)
_VIDEO_WEIGHT = 512  # pictures that a video stands for where chunks are made
Source = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class Entry(NamedTuple):
    """One thing that a worker reads as a whole.

    Args:
        kind: how it is read.
        path: of the file.
        group: the row group of a Parquet file.
        weight: about so many pictures.
        column: with the encoded pictures, of a Parquet file.
    """

    kind: Kind
    path: str
    group: int = 0
    weight: int = 1
    column: str = ""


Chunk = tuple[Entry, ...]


def entries_of(source: Source, column: str | None = None) -> tuple[list[Entry], int]:
    """The entries of a source, in an order that does not depend on the file system, and how many other files it has.

    Args:
        source: a folder (with those below it), a file, or paths of files.
        column: of Parquet files, with paths or encoded pictures; None for the only one that can be meant.

    Raises:
        EmbedError: there is no such file, or nothing in it that can be read.
    """
    if isinstance(source, str | os.PathLike):
        paths = list(_walked(Path(source)))
    elif isinstance(source, Iterable):
        paths = [os.fspath(path) for path in source]
    else:
        raise EmbedError(f"the source is a {type(source).__name__}; pass a folder, a file, or paths of pictures")
    entries: list[Entry] = []
    others = 0
    for path in paths:
        found = list(_entries(path, column))
        entries += found
        others += _kind(path) is None
    if any(entry.kind == "video" for entry in entries) and importlib.util.find_spec("av") is None:
        raise EmbedError("there are videos, which need PyAV: pip install av", code=Code.MISSING)
    if not entries:
        raise EmbedError(
            f"nothing to embed in {_shown(source)}; give a folder or files with pictures "
            f"({', '.join(PICTURES)}), videos ({', '.join(VIDEOS)}), tars of pictures, or a Parquet file"
        )
    return entries, others


def chunks_of(entries: Sequence[Entry], size: int) -> list[Chunk]:
    """Consecutive entries of about `size` pictures; a tar, whose pictures are not counted yet, is one by itself."""
    chunks: list[Chunk] = []
    open_chunk: list[Entry] = []
    weight = 0
    for entry in entries:
        if open_chunk and (weight + entry.weight > size or "tar" in (entry.kind, open_chunk[-1].kind)):
            chunks.append(tuple(open_chunk))
            open_chunk, weight = [], 0
        open_chunk.append(entry)
        weight += entry.weight
    return chunks + ([tuple(open_chunk)] if open_chunk else [])


def pieces_of(chunk: Chunk, batch: int) -> list[Chunk]:
    """What one worker reads at a time: `batch` pictures, or one of the others."""
    pieces: list[list[Entry]] = []
    for entry in chunk:
        if entry.kind == "picture" and pieces and pieces[-1][0].kind == "picture" and len(pieces[-1]) < batch:
            pieces[-1].append(entry)
        else:
            pieces.append([entry])
    return [tuple(piece) for piece in pieces]


def _walked(root: Path) -> Iterator[str]:
    if root.is_file():
        yield str(root)
    elif root.is_dir():
        seen = set()  # links may lead in a circle
        for folder, folders, files in os.walk(root, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (os.path.join(folder, name) for name in sorted(files) if not name.startswith("."))
    else:
        raise EmbedError(f"there is no folder or file {root}")


def _kind(path: str) -> Kind | None:
    name = path.lower()
    suffixes: dict[Kind, tuple[str, ...]] = {"picture": PICTURES, "video": VIDEOS, "tar": TARS, "rows": PARQUET}
    return next((kind for kind, of in suffixes.items() if name.endswith(of)), None)


def _entries(path: str, column: str | None) -> Iterator[Entry]:
    kind = _kind(path)
    if kind == "rows":
        yield from _of_parquet(path, column)
    elif kind is not None:
        yield Entry(kind, path, weight=_VIDEO_WEIGHT if kind == "video" else 1)


def _of_parquet(path: str, column: str | None) -> Iterator[Entry]:
    pa, pq = arrow()
    try:
        with pq.ParquetFile(path) as file:
            name = _column(path, file.schema_arrow, column, pa)
            if _is_text(file.schema_arrow.field(name).type, pa):
                for batch in file.iter_batches(columns=[name], use_threads=False):
                    values = batch.column(0).to_pylist()
                    if None in values:
                        raise EmbedError(f"column {name!r} of {path} has rows without a path; leave them out")
                    # relative paths are relative to the table
                    yield from (Entry("picture", os.path.join(os.path.dirname(path), value)) for value in values)
                return
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise EmbedError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    yield from (Entry("rows", path, i, rows, name) for i, rows in enumerate(groups))


def _column(path: str, schema: Any, column: str | None, pa: Any) -> str:
    fits = [f.name for f in schema if _is_text(f.type, pa) or _is_encoded(f.type, pa)]
    if column is not None:
        if column not in fits:
            raise EmbedError(
                f"{path} has no column {column!r} of paths or encoded pictures; it has {', '.join(fits) or 'none'}"
            )
        return column
    encoded = [f.name for f in schema if _is_encoded(f.type, pa)]
    chosen = encoded or fits  # a path beside the bytes is their name
    if len(chosen) != 1:
        raise EmbedError(
            f"{path}: which column has the pictures? Name it with --column (column=), one of "
            f"{', '.join(fits) or ', '.join(schema.names) + ', of which none has text or bytes'}"
        )
    return str(chosen[0])


def _is_text(kind: Any, pa: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_encoded(kind: Any, pa: Any) -> bool:
    if pa.types.is_struct(kind):  # as the library datasets stores images
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def arrow() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet.

    Raises:
        EmbedError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EmbedError("Parquet needs pyarrow: pip install pyarrow", code=Code.MISSING) from error
    return pyarrow, pyarrow.parquet


def _shown(source: Source) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "the paths given"
