"""Frames of a video file, through PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from torch import Tensor

from passes.graph.base import CompileError
from passes.graph.codes import Code


class VideoError(CompileError):
    """A file that cannot be read as a video, or is too short."""

    family = Code.MODEL_FILE


def uniform_frames(path: Path, count: int = 12) -> Tensor:
    """`count` frames, evenly spaced by index: the middle one of each of `count` equal segments.

    UMT's convention at test time: segment i of n frames is floor(i n / count) to floor((i + 1) n / count) - 1, its
    middle (first + last) // 2. n is counted by decoding: what a container claims is used to read only once, and
    the file is read again where the claim was wrong or missing.

    Args:
        path: any container and codec that FFmpeg reads; the first video stream is taken.
        count: how many.

    Returns:
        uint8 [count, H, W, 3], RGB.

    Raises:
        VideoError: the file cannot be read to its end, has no video, or has fewer frames.
    """
    try:
        claimed = _claimed(path)
        frames, counted = _pick(path, middles(claimed, count)) if claimed >= count else ([], _pick(path, [])[1])
        if counted < count:
            raise VideoError(
                f"{path} has {counted} frames, {count} were asked for; ask for fewer (--frames), or leave it out"
            )
        if counted != claimed:
            frames, _ = _pick(path, middles(counted, count))
        return torch.from_numpy(np.stack(frames))
    except FileNotFoundError:
        raise VideoError(f"there is no video file {path}") from None
    except (av.FFmpegError, OSError, ValueError) as error:  # ValueError: frames of changing size
        raise VideoError(f"{path} cannot be read as a video ({getattr(error, 'strerror', None) or error})") from error


def middles(frames: int, count: int) -> list[int]:
    """The indices of `count` of `frames` frames: the middle of each of `count` equal segments; see `uniform_frames`."""
    edges = [i * frames // count for i in range(count + 1)]
    return [(first + end - 1) // 2 for first, end in pairwise(edges)]


def _claimed(path: Path) -> int:
    """How many frames the container says it has; 0 where it does not say."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise VideoError(f"{path} has no video stream")
        return container.streams.video[0].frames


def _pick(path: Path, indices: list[int]) -> tuple[list[np.ndarray], int]:
    """The frames of these ascending indices, uint8 [H, W, 3] each, and how many there are in the file."""
    wanted, found, counted = set(indices), [], 0
    with av.open(str(path)) as container:
        for frame in _decoded(container):
            if counted in wanted:
                found.append(frame.to_ndarray(format="rgb24"))
            counted += 1
    return found, counted


def _decoded(container: InputContainer) -> Iterator[av.VideoFrame]:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    yield from container.decode(stream)
