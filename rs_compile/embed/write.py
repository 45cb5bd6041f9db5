"""Chunks of a source into their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from rs_compile.embed.errors import EmbedError
from rs_compile.embed.run import Embedder
from rs_compile.embed.shards import Folder, Shard
from rs_compile.embed.sources import Chunk, pieces_of
from rs_compile.embed.speed import Speed


class Shown(Protocol):
    """Who is told how far it is, such as `rs_compile.search.progress.Bar`."""

    def expect(self, steps: int) -> None: ...
    def say(self, text: str) -> None: ...
    def step(self) -> None: ...


class Silent:
    """Tells nobody."""

    def expect(self, steps: int) -> None: ...
    def say(self, text: str) -> None: ...
    def step(self) -> None: ...


def shape_of_features(embedder: Embedder, settings: Mapping[str, Any], shown: Shown) -> torch.Size:
    """Of one picture's features; the first time this compiles."""
    shown.say("compiling")
    noise = torch.randn(embedder.batch, *settings["input_size"], generator=torch.Generator().manual_seed(0))
    return embedder(noise).shape[1:]


def write(
    chunks: Mapping[int, Chunk],
    embedder: Embedder,
    folder: Folder,
    settings: Mapping[str, Any],
    speed: Speed,
    shown: Shown,
) -> None:
    """Writes the file of each chunk; what is begun and not done leaves nothing.

    Args:
        chunks: by number.
        settings: of the run; they go into each file.

    Raises:
        EmbedError: the folder cannot be written, or float16 cannot hold the features.
    """
    split = {i: pieces_of(chunk, embedder.batch) for i, chunk in chunks.items()}
    pieces = [piece for of in split.values() for piece in of]
    home = [i for i, of in split.items() for _ in of]
    unread = {i: len(of) for i, of in split.items()}
    shown.expect(len(pieces))
    shape = shape_of_features(embedder, settings, shown)
    note, shards = json.dumps(settings), dict[int, Shard]()
    try:
        for batch, features in embedder.run(pieces, speed):
            i = home[batch.piece]
            try:
                if i not in shards:
                    shards[i] = Shard(folder, i, shape, settings["store"] == "float16", note)
                shards[i].add(batch.names, features, batch.failures)
                unread[i] -= batch.last
                if not unread[i]:
                    shards[i].finish()
                    del shards[i]
            except OSError as error:
                raise EmbedError(
                    f"{folder.path} cannot be written ({error}); what is whole there stays, the same command goes on"
                ) from error
            if batch.last:
                shown.step()
            shown.say(f"{speed.pictures} pictures, {speed.skipped} skipped")
    finally:
        for shard in shards.values():
            shard.drop()
