"""The pictures of a search: read from a folder, a tensor or a loader, and split in two halves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes.graph.base import CompileError
from passes.graph.codes import Code
from rs_compile import models

LEAST = 8


class SearchError(CompileError, ValueError):
    """A search that cannot be made or whose target nothing reaches; says what to give instead."""

    family = Code.PICTURES


@dataclass(frozen=True)
class Pictures:
    """Inputs of a model by name, "" where there is one that is passed by place; each [B, ...].

    Args:
        tensors: by name.
        index: [B], the place of each in what the user gave.
    """

    tensors: Mapping[str, Tensor]
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    @property
    def args(self) -> tuple[Tensor, ...]:
        return tuple(t for name, t in self.tensors.items() if not name)

    @property
    def kwargs(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors.items() if name}

    def taken(self, at: Tensor) -> Pictures:
        """Those at these places [K]."""
        return Pictures({name: t[at] for name, t in self.tensors.items()}, self.index[at])

    def batches(self, size: int) -> Iterator[Pictures]:
        """In order, `size` a batch."""
        for at in torch.arange(len(self)).split(size):
            yield self.taken(at)

    def to(self, device: torch.device) -> Pictures:
        return Pictures({name: t.to(device) for name, t in self.tensors.items()}, self.index)

    def digest(self) -> str:
        """A hash of their values."""
        return digest(self.tensors.items())


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of named tensors: names, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def halves(pictures: Pictures, seed: int) -> tuple[Pictures, Pictures]:
    """A random half to search on, and the other one."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    middle = (len(pictures) + 1) // 2
    return pictures.taken(order[:middle].sort().values), pictures.taken(order[middle:].sort().values)


def read(images: Any, model: nn.Module, limit: int, seed: int, size: int | None = None) -> Pictures:
    """The pictures that a user gave, at most `limit` of them: a random choice, of a loader the first.

    Args:
        images: a tensor [n, C, H, W], a folder, or an iterable of batches (a `DataLoader`): tensors, tuples of which
            the first entry counts, or dicts of keyword inputs.
        model: a folder's pictures are transformed as timm's models ask.
        size: side of a folder's pictures in pixels; None for the model's own.

    Raises:
        SearchError: fewer than 8, of different sizes, or nothing that can be read.
    """
    if isinstance(images, str | PathLike):
        found = _chosen(_files(Path(images), model, limit, seed, size), limit, seed)
    elif isinstance(images, Tensor | Mapping):
        found = _chosen(_batch(images), limit, seed)
    elif isinstance(images, Iterable):
        found = _loaded(images, limit)
    else:
        raise SearchError(
            f"images is a {type(images).__name__}; pass a tensor [n, C, H, W], a folder of pictures, or a DataLoader"
        )
    if len(found) < LEAST:
        raise SearchError(
            f"{len(found)} pictures are too few to search on one half and report on the other; pass at least {LEAST}, "
            "better 64, of the kind that the model will see"
        )
    return found


def _batch(batch: Any) -> Pictures:
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    tensors = {"": batch} if isinstance(batch, Tensor) else batch
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) and t.dim() for t in tensors.values()):
        raise SearchError(
            f"a batch of images is a {type(batch).__name__}; pass tensors [B, C, H, W], (tensor, labels) pairs, "
            "or dicts of tensors by the names of the model's inputs"
        )
    sizes = {len(t) for t in tensors.values()}
    if len(sizes) != 1:
        raise SearchError(f"a batch of images has inputs of {sorted(sizes)} samples; each needs as many")
    return Pictures(dict(tensors), torch.arange(sizes.pop()))


def _chosen(pictures: Pictures, limit: int, seed: int) -> Pictures:
    if len(pictures) <= limit:
        return pictures
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    return pictures.taken(order[:limit].sort().values)


def _loaded(batches: Iterable[Any], limit: int) -> Pictures:
    parts: list[Pictures] = []
    count = 0
    for batch in batches:
        parts.append(_batch(batch))
        count += len(parts[-1])
        if count >= limit:
            break
    if not parts:
        return Pictures({}, torch.arange(0))
    shapes = {tuple((n, *t.shape[1:]) for n, t in part.tensors.items()): None for part in parts}
    if len(shapes) > 1:
        first, second = ([list(shape[1:]) for shape in of] for of in list(shapes)[:2])
        raise SearchError(f"the pictures are of different sizes, {first} and {second}; resize them to one")
    joined = {name: torch.cat([part.tensors[name] for part in parts])[:limit] for name in parts[0].tensors}
    return Pictures(joined, torch.arange(min(count, limit)))


def _files(folder: Path, model: nn.Module, limit: int, seed: int, size: int | None) -> Pictures:
    try:
        paths = models.pictures_in(folder)
    except models.ImageError as error:
        raise SearchError(error.text) from error
    if len(paths) < LEAST:
        raise SearchError(f"{folder} has {len(paths)} pictures; give {LEAST} at least, better 64")
    if not hasattr(model, "pretrained_cfg"):
        raise SearchError(
            f"{type(model).__name__} is not a timm model, so how to resize and normalise a folder's pictures is not "
            "known; pass a DataLoader or a tensor [n, C, H, W], transformed as the model asks"
        )
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
    if size is None:
        size = models.built_size(model)
    chosen = [paths[i] for i in order.tolist()]
    return Pictures({"": models.load_images(chosen, model, size)}, order)
