"""Frames of a video file, through PyAV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
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
    """`count` frames, evenly spaced by index: the middle one of each of `count` equal segments; see `middles`.

    Args:
        path: any container and codec that FFmpeg reads; the first video stream is taken.
        count: how many.

    Returns:
        uint8 [count, H, W, 3], RGB.

    Raises:
        VideoError: the file cannot be read to its end, has no video, or has fewer frames.
    """
    frames, counted = _frames(path, lambda n, _: middles(n, count) if n >= count else [])
    if counted < count:
        raise VideoError(
            f"{path} has {counted} frames, {count} were asked for; ask for fewer (--frames), or leave it out"
        )
    return frames


def padded_frames(path: Path, count: int = 12, seconds: int | None = None) -> Tensor:
    """As `uniform_frames`; of a file with fewer frames all, and the last one again up to `count`, as UMT has it.

    Args:
        path, count: see `uniform_frames`.
        seconds: only frames of so many first seconds are taken, counted by the mean frame rate.

    Raises:
        VideoError: the file cannot be read to its end, has no frame, or does not say the frame rate that is needed.
    """

    def choose(n: int, rate: Fraction | None) -> list[int]:
        if seconds is not None:
            if rate is None:
                raise VideoError(f"{path} does not say its frame rate, by which the first {seconds} s are counted")
            n = min(n, int(seconds * rate))
        chosen = middles(n, min(n, count)) if n else []
        return chosen + chosen[-1:] * (count - len(chosen))

    frames, _ = _frames(path, choose)
    if not len(frames):
        raise VideoError(f"{path} has no frames")
    return frames


def _frames(path: Path, choose: Callable[[int, Fraction | None], list[int]]) -> tuple[Tensor, int]:
    """The chosen frames, uint8 [T, H, W, 3], and how many there are in the file.

    n is counted by decoding: what a container claims is used to read only once, and the file is read again where the
    claim was wrong or missing.

    Args:
        choose: from the number of frames and the frame rate to the wanted indices, ascending.
    """
    try:
        claimed, rate = _claimed(path)
        wanted = choose(claimed, rate)
        found, counted = _pick(path, wanted)
        if counted != claimed:
            wanted = choose(counted, rate)
            found, _ = _pick(path, wanted)
        frames = torch.from_numpy(np.stack([found[index] for index in wanted])) if wanted else torch.empty(0)
        return frames, counted
    except FileNotFoundError:
        raise VideoError(f"there is no video file {path}") from None
    except (av.FFmpegError, OSError, ValueError) as error:  # ValueError: frames of changing size
        raise VideoError(f"{path} cannot be read as a video ({getattr(error, 'strerror', None) or error})") from error


def middles(frames: int, count: int) -> list[int]:
    """The indices of `count` of `frames` frames: the middle of each of `count` equal segments.

    UMT's convention at test time: segment i of n frames is floor(i n / count) to floor((i + 1) n / count) - 1, its
    middle (first + last) // 2.
    """
    edges = [i * frames // count for i in range(count + 1)]
    return [(first + end - 1) // 2 for first, end in pairwise(edges)]


def _claimed(path: Path) -> tuple[int, Fraction | None]:
    """How many frames the container says it has, 0 where it does not say, and their mean rate."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise VideoError(f"{path} has no video stream")
        stream = container.streams.video[0]
        return stream.frames, stream.average_rate


def _pick(path: Path, indices: list[int]) -> tuple[dict[int, np.ndarray], int]:
    """The frames of these indices, uint8 [H, W, 3] each, and how many there are in the file."""
    wanted, found, counted = set(indices), {}, 0
    with av.open(str(path)) as container:
        for frame in _decoded(container):
            if counted in wanted:
                found[counted] = frame.to_ndarray(format="rgb24")
            counted += 1
    return found, counted


def _decoded(container: InputContainer) -> Iterator[av.VideoFrame]:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    yield from container.decode(stream)
