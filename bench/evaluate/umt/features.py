"""Video tokens on disk, a file for each batch and method, so that texts can be held against them in any order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bench.evaluate.ranks import Ranks

Features = tuple[Tensor, Tensor]  # tokens [B, K, C], pooled [B, D]


class FeatureFiles:
    """The features of several methods on the same batches of videos; what `sweep` notes its batches in.

    A file is renamed to its name when it is whole, so one that is there is done, and an interruption costs the batch
    under way. All processes of an evaluation see the same folders.

    Args:
        folders: of each method; made where there is none.
        batches: how many there will be.
        ranks: the processes; all make theirs at the same point.
    """

    def __init__(self, folders: Mapping[str, Path], batches: int, ranks: Ranks) -> None:
        self._folders = dict(folders)
        self._held: dict[str, Features] = {}
        found: dict[int, Any] = {}
        if ranks.first:
            for folder in self._folders.values():
                folder.mkdir(parents=True, exist_ok=True)
            # where one method lacks a batch, its videos are read again for all
            whole = [b for b in range(batches) if all(_file(f, b).exists() for f in self._folders.values())]
            found = {batch: _value(_file(next(iter(self._folders.values())), batch)) for batch in whole}
        self.done: Mapping[int, Any] = ranks.broadcast(found)

    def hold(self, features: Mapping[str, Features]) -> None:
        """The features of every method on the batch that is added next."""
        self._held = {
            name: (tokens.cpu().contiguous(), pooled.cpu().contiguous()) for name, (tokens, pooled) in features.items()
        }

    def add(self, batch: int, value: Any) -> None:
        """Notes a batch with what was held of it; of one without a readable video nothing was."""
        for name, folder in self._folders.items():
            tensors = dict(zip(("tokens", "pooled"), self._held.get(name, ()), strict=False))
            target = _file(folder, batch)
            fresh = target.with_suffix(".new")
            safetensors.torch.save_file(tensors, fresh, {"value": json.dumps(value)})
            fresh.replace(target)
        self._held = {}

    def close(self) -> None:
        """Nothing is open between batches."""


class Tokens:
    """The tokens [K, C] of a video, by its place among those that could be read.

    Args:
        folder: of one method.
        batches: of the numbers of the batches' videos, in their order; an empty one had nothing readable.
    """

    def __init__(self, folder: Path, batches: Mapping[int, Sequence[int]]) -> None:
        self._folder = folder
        self._places = [(batch, row) for batch, videos in batches.items() for row in range(len(videos))]

    def __call__(self, index: int) -> Tensor:
        batch, row = self._places[index]
        with safetensors.safe_open(_file(self._folder, batch), "pt") as file:
            tokens: Tensor = file.get_slice("tokens")[row]
            return tokens

    def pooled(self) -> Tensor:
        """The pooled features [V, D] of all videos."""
        batches = dict.fromkeys(batch for batch, _ in self._places)
        parts = []
        for batch in batches:
            with safetensors.safe_open(_file(self._folder, batch), "pt") as file:
                parts.append(file.get_tensor("pooled"))
        return torch.cat(parts)


def _file(folder: Path, batch: int) -> Path:
    return folder / f"{batch:06d}.safetensors"


def _value(path: Path) -> Any:
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["value"])
