"""Frames of real video files that the tests encode; every frame carries its number as its grey level."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from bench.evaluate.frames import VideoError, middles, padded_frames, uniform_frames

STEP = 4  # grey levels between frames, more than what a lossy codec changes


def video(path: Path, frames: int, codec: str = "ffv1", pixels: str = "gray", size: tuple[int, int] = (32, 48)) -> Path:
    """A video of `frames` frames, frame i of grey level STEP * i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25))
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        stream.bit_rate = 4_000_000  # enough to keep the grey levels apart
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), STEP * i, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(frames: torch.Tensor) -> list[int]:
    return [round(level / STEP) for level in frames.float().mean((1, 2, 3)).tolist()]


# segments of 10 frames in 3: 0-2, 3-5, 6-9
@pytest.mark.parametrize(
    ("n", "count", "wanted"), [(10, 3, [1, 4, 7]), (12, 12, list(range(12))), (24, 4, [2, 8, 14, 20])]
)
def test_the_middle_of_equal_segments(n: int, count: int, wanted: list[int]) -> None:
    assert middles(n, count) == wanted


def test_the_indices_are_umts() -> None:
    for n in (12, 13, 47, 301, 1799):  # as its public code has it, in NumPy
        edges = np.linspace(start=0, stop=n, num=13).astype(int)
        assert middles(n, 12) == [(edges[i] + edges[i + 1] - 1) // 2 for i in range(12)]


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.webm", "libvpx", "yuv420p"),
        ("a.mkv", "ffv1", "gray"),
    ],
)
def test_frames_of_a_file(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    frames = uniform_frames(video(tmp_path / name, 40, codec, pixels), 8)
    assert frames.dtype == torch.uint8 and frames.shape == (8, 32, 48, 3)
    assert numbers(frames) == [2, 7, 12, 17, 22, 27, 32, 37]


def test_a_container_that_does_not_count(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mkv", 25)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert numbers(uniform_frames(path, 5)) == [2, 7, 12, 17, 22]


def test_a_container_that_counts_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = video(tmp_path / "a.mkv", 25)
    for claimed in (5, 24, 26, 1000):
        monkeypatch.setattr("bench.evaluate.frames._claimed", lambda _, claimed=claimed: (claimed, None))
        assert numbers(uniform_frames(path, 5)) == [2, 7, 12, 17, 22]


def test_as_many_frames_as_there_are(tmp_path: Path) -> None:
    assert numbers(uniform_frames(video(tmp_path / "a.mkv", 12))) == list(range(12))


@pytest.mark.parametrize("name", ["a.mkv", "a.avi"])
def test_fewer_frames_than_asked_for(tmp_path: Path, name: str) -> None:
    path = video(tmp_path / name, 11, *(("mpeg4", "yuv420p") if name == "a.avi" else ()))
    with pytest.raises(VideoError, match=rf"{name} has 11 frames, 12 were asked for; ask for fewer"):
        uniform_frames(path)


@pytest.mark.parametrize(("frames", "count"), [(5, 8), (8, 8), (1, 3), (25, 5)])
def test_too_few_frames_end_in_the_last_one_again(tmp_path: Path, frames: int, count: int) -> None:
    """As UMT's public code has it, in NumPy."""
    edges = np.linspace(start=0, stop=frames, num=min(count, frames) + 1).astype(int)
    wanted = [(edges[i] + edges[i + 1] - 1) // 2 for i in range(len(edges) - 1)]
    wanted += [wanted[-1]] * (count - len(wanted))
    assert numbers(padded_frames(video(tmp_path / "a.mkv", frames), count)) == wanted


def test_the_first_seconds_alone(tmp_path: Path) -> None:
    """At 25 a second; a file that is shorter is taken whole."""
    path = video(tmp_path / "a.mp4", 60, "libx264", "yuv420p")
    assert numbers(padded_frames(path, 5, seconds=1)) == [2, 7, 12, 17, 22]
    assert numbers(padded_frames(path, 5, seconds=30)) == numbers(padded_frames(path, 5)) == [5, 17, 29, 41, 53]


def test_seconds_of_a_file_without_a_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.evaluate.frames._claimed", lambda _: (25, None))
    path = video(tmp_path / "a.mkv", 25)
    assert len(padded_frames(path, 5)) == 5
    with pytest.raises(VideoError, match=r"a\.mkv does not say its frame rate, by which the first 30 s are counted"):
        padded_frames(path, 5, seconds=30)


def test_files_that_are_no_videos(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("hello" * 100)
    (tmp_path / "empty.mp4").touch()
    whole = video(tmp_path / "a.mp4", 40, "libx264", "yuv420p").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for name in ("text.mp4", "empty.mp4", "cut.mp4"):
        with pytest.raises(VideoError, match=rf"{name} cannot be read as a video \(.+\)"):
            uniform_frames(tmp_path / name)
    with pytest.raises(VideoError, match="there is no video file"):
        uniform_frames(tmp_path / "nowhere.mp4")


def test_sound_without_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="has no video stream"):
        uniform_frames(path)
