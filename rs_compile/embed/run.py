"""`embed`: a model over a source, batch by batch, with what could not be read beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from passes.graph.codes import Code
from passes.pipeline import Progress
from rs_compile.compiling import Backend
from rs_compile.embed.decode import Reader
from rs_compile.embed.errors import EmbedError
from rs_compile.embed.features import Features
from rs_compile.embed.loader import Batch, Decoded, Failure, default_workers, loaded
from rs_compile.embed.sources import Chunk, Source, chunks_of, entries_of, pieces_of
from rs_compile.embed.speed import Speed
from rs_compile.models import built_size, evaluation_transform
from rs_compile.optimize import OptimizedModel, optimize

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Embedder:
    """A model that is ready for pictures.

    Args:
        fast: pictures [B, C, H, W] to features [B, ...].
        transform: a picture to the model's input [C, H, W].
        reader: opens files.
        batch: pictures a call.
        workers: processes that decode.
    """

    fast: OptimizedModel
    transform: Transform
    reader: Reader
    batch: int
    workers: int

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features on the CPU, of the model's dtype.

        Raises:
            EmbedError: the model returns something else than a tensor with an entry per picture.
        """
        weight = next(self.fast.parameters(), torch.empty(0))
        with torch.inference_mode():
            found = self.fast(pictures.to(weight.device, weight.dtype))
        if not isinstance(found, Tensor) or found.shape[:1] != pictures.shape[:1]:
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise EmbedError(
                f"the model returns {what} for {len(pictures)} pictures, not a tensor with an entry per picture; "
                "wrap it in a module that returns one"
            )
        return found.cpu()

    def run(self, pieces: Sequence[Chunk], speed: Speed) -> Iterator[tuple[Batch, Tensor | None]]:
        """Batches of the pieces and their features; what is not finite is a failure, and not among them."""
        batches = loaded(Decoded(pieces, self.reader, self.transform, self.batch), self.workers)
        asked = time.perf_counter()
        for batch in batches:
            got = time.perf_counter()
            speed.waited(got - asked, batch)
            features = None
            if batch.pictures is not None:
                features = self(batch.pictures)
                batch.pictures = None
                features = _finite(batch, features)
            speed.computed(time.perf_counter() - got, batch)
            before = time.perf_counter()
            yield batch, features
            asked = time.perf_counter()
            speed.used(asked - before)


class Embedding:
    """Features of a source's pictures, batch by batch: an iterator of (paths, features [B, ...]).

    `failures` has what was skipped until now, each with `path` and `reason`; `speed`, printed, how fast it went and
    whether decoding was the limit.
    """

    def __init__(self, embedder: Embedder, pieces: Sequence[Chunk]) -> None:
        self.failures: list[Failure] = []
        self.speed = Speed(embedder.workers)
        self._found = self._run(embedder, pieces)

    def __iter__(self) -> Iterator[tuple[list[str], Tensor]]:
        return self

    def __next__(self) -> tuple[list[str], Tensor]:
        return next(self._found)

    def close(self) -> None:
        """Ends the processes that decode, before the end."""
        self._found.close()

    def _run(self, embedder: Embedder, pieces: Sequence[Chunk]) -> Generator[tuple[list[str], Tensor], None, None]:
        for batch, features in embedder.run(pieces, self.speed):
            self.failures += batch.failures
            if features is not None and batch.names:
                yield batch.names, features


def embed(
    model: nn.Module,
    schedule: Any,
    source: Source,
    *,
    features: str = "class",
    batch_size: int = 32,
    workers: int | None = None,
    transform: Transform | None = None,
    img_size: int | None = None,
    every: int = 1,
    column: str | None = None,
    backend: Backend = "inductor",
    progress: Progress | None = None,
) -> Embedding:
    """Features of every picture of a source, by the pruned model.

    Args:
        model: in eval mode, on its device and of its dtype. timm's, or any with a `transform`.
        schedule: see `optimize`; {} prunes nothing.
        source: a folder (all below it), a file, or paths of files: pictures, videos by frames, tars of pictures
            (webdataset), Parquet files with a column of paths or of encoded pictures.
        features: "class" [B, C], "pooled" [B, C], "tokens" [B, N, C] or "output", see `Features`.
        batch_size: pictures a call of the model; the last ones of a file may be fewer.
        workers: processes that decode; 0 decodes in this one. None: all cores up to 8 for a model on a GPU, half of
            them for one on a CPU.
        transform: a PIL picture to the model's input, a tensor [C, H, W]. None: timm's for this model.
        img_size: side of the pictures in pixels; None for that which the model was built for.
        every: of a video, one frame in so many, from the first.
        column: of Parquet files; None for the only one that can be meant.
        backend: see `optimize`.
        progress: called with a line of text at each stage of the first call.

    Returns:
        An iterator of (paths, features on the CPU). Pictures come in the source's order; videos, tars and rows in each
        file's, several files side by side. Frames, members and rows are named "file#frame", "file#member",
        "file#row". What cannot be read is in the iterator's `failures`.

    Raises:
        EmbedError: there is nothing to embed, or an option cannot be followed.
        CompileError: see `optimize`, when the first batch is asked for.
    """
    embedder = ready(
        model,
        schedule,
        features=features,
        batch_size=batch_size,
        workers=workers,
        transform=transform,
        img_size=img_size,
        every=every,
        backend=backend,
        progress=progress,
    )
    entries, _ = entries_of(source, column)
    return Embedding(embedder, [p for chunk in chunks_of(entries, batch_size) for p in pieces_of(chunk, batch_size)])


def ready(
    model: nn.Module,
    schedule: Any,
    *,
    features: str,
    batch_size: int,
    workers: int | None,
    transform: Transform | None,
    img_size: int | None,
    every: int,
    backend: Backend,
    progress: Progress | None,
) -> Embedder:
    """See `embed`."""
    for name, value, least in (("batch_size", batch_size, 1), ("every", every, 1), ("workers", workers, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise EmbedError(f"{name} is {value!r}; give an integer of at least {least}")
    if model.training:
        raise EmbedError(
            "the model is in train mode, where features depend on the batch and on chance; call .eval()",
            code=Code.TRAIN_MODE,
        )
    colours = "RGB"
    if transform is None:
        if not hasattr(model, "pretrained_cfg"):
            raise EmbedError(
                f"{type(model).__name__} is not a timm model, so how to resize and normalise pictures is not known; "
                "pass transform=, from a PIL picture to a tensor [C, H, W]"
            )
        transform, colours = evaluation_transform(model, img_size or built_size(model))
    if workers is None:
        workers = default_workers(any(p.is_cuda for p in model.parameters()))
    wrapped = Features(model, features)
    fast = optimize(wrapped, schedule, backend=backend, progress=progress)
    return Embedder(fast, transform, Reader(colours, every), batch_size, workers)


def _finite(batch: Batch, features: Tensor) -> Tensor:
    """The features of pictures for which the model gives numbers; the others are failures."""
    good = features.flatten(1).isfinite().all(1)
    if not good.all():
        reason = "the model gives infinity or NaN for it"
        batch.failures += [Failure(n, reason) for n, fine in zip(batch.names, good.tolist(), strict=True) if not fine]
        batch.names = [n for n, fine in zip(batch.names, good.tolist(), strict=True) if fine]
        features = features[good]
    return features
