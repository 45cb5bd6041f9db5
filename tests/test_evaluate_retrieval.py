"""Recalls on matrices with known answers, and retrieval on short real videos of plain colours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench.evaluate.journal import EvaluationError
from bench.evaluate.recall import Found, Recalls, means, recalls, related
from bench.evaluate.retrieval import RetrievalScores, evaluate_retrieval, read_captions

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def test_a_perfect_matrix() -> None:
    every = Recalls(100, 100, 100)
    assert recalls(torch.eye(12), torch.eye(12).bool()) == Found(every, every, every, every)


def test_ranks_worked_by_hand() -> None:
    similarity = torch.tensor(
        [
            [0.9, 0.1, 0.2],  # video 0 first
            [0.8, 0.3, 0.7],  # video 1 third
            [0.1, 0.2, 0.6],  # video 2 first
            [0.5, 0.4, 0.3],  # video 0 first
        ]
    )
    found = recalls(similarity, own([0, 1, 2, 0]))
    assert found.text_to_video == Recalls(75, 100, 100)
    # video 0: its captions 0.9 and 0.5 against 0.8, found; video 1: 0.3 against 0.4; video 2: 0.6 against 0.7
    assert found.video_to_text == Recalls(pytest.approx(100 / 3), 100, 100)
    assert found.harmonic == Recalls(pytest.approx(2 * 75 * (100 / 3) / (75 + 100 / 3)), 100, 100)
    assert found.arithmetic == Recalls(pytest.approx((75 + 100 / 3) / 2), 100, 100)


def test_ranks_beyond_five_and_ten() -> None:
    # of caption i the videos 0..i-1 stand before its own
    similarity = torch.triu(torch.ones(20, 20)).T - 0.5 * torch.eye(20)
    shares = Recalls(5, 25, 50)  # of video i the captions i+1..19 stand before its own
    assert recalls(similarity, own(range(20))) == Found(shares, shares, shares, shares)


@pytest.mark.parametrize(
    ("texts", "videos", "printed"),
    [
        ((51.0, 76.5, 84.2), (49.0, 77.0, 84.7), (50.0, 76.8, 84.5)),  # MSRVTT B; the paper has 83.9 for the last
        ((58.8, 81.0, 87.1), (58.6, 81.6, 86.5), (58.7, 81.3, 86.8)),  # MSRVTT L
        ((58.2, 83.9, 89.6), (82.4, 94.6, 96.7), (70.3, 89.3, 93.2)),  # MSVD L
        ((66.8, 89.1, 94.9), (64.4, 89.1, 94.8), (65.6, 89.1, 94.9)),  # ActivityNet L
        ((32.7, 54.7, 63.4), (32.7, 53.5, 63.2), (32.7, 54.1, 63.3)),  # LSMDC B
    ],
)
def test_the_papers_base_rows_are_arithmetic_means(
    texts: tuple[float, ...], videos: tuple[float, ...], printed: tuple[float, ...]
) -> None:
    """Of the recalls that UMT published; the harmonic mean of MSVD's is 2 points lower."""
    arithmetic, harmonic = means(Recalls(*texts), Recalls(*videos))
    assert arithmetic.all == pytest.approx(printed, abs=0.0501)
    if texts[0] == 58.2:
        assert harmonic.r1 == pytest.approx(68.22, abs=0.005)


def test_no_luck_in_ties() -> None:
    assert set(vars(recalls(torch.ones(6, 6), own(range(6)))).values()) == {Recalls(0, 0, 100)}
    found = recalls(torch.tensor([[1.0, 1.0], [0.0, 2.0]]), own([0, 1]))
    assert (found.text_to_video.r1, found.video_to_text.r1, found.harmonic.r1) == (50, 100, pytest.approx(200 / 3))


def test_nothing_found_one_way() -> None:
    found = recalls(torch.tensor([[0.0, 2.0], [0.0, 1.0]]), own([0, 1]))
    assert (found.text_to_video.r1, found.video_to_text.r1) == (50, 0)
    assert (found.arithmetic.r1, found.harmonic.r1) == (25, 0)


def test_what_has_no_recall() -> None:
    with pytest.raises(EvaluationError, match="video 1 has no caption"):
        recalls(torch.ones(2, 3), own([0, 2]))
    with pytest.raises(EvaluationError, match="caption 1 has no video"):
        recalls(torch.ones(2, 1), torch.tensor([[True], [False]]))
    with pytest.raises(EvaluationError, match="not finite"):
        recalls(torch.full((2, 2), torch.nan), own([0, 1]))
    with pytest.raises(EvaluationError, match="not finite"):
        recalls(torch.eye(2), own([0, 1]), torch.full((2, 2), torch.inf))


def test_several_videos_of_a_text_and_two_matrices() -> None:
    """Whichever fits best counts; each direction reads its own scores."""
    belong = related([(0, 0), (0, 2), (1, 1)], 2, 3)
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    found = recalls(scores, belong)
    # text 0: video 2 is first; text 1: video 2 before 1. Videos 0 and 2 have text 1 before theirs, video 1 has not
    assert (found.text_to_video.r1, found.video_to_text.r1) == (50, pytest.approx(100 / 3))
    assert recalls(scores, belong, -scores).video_to_text.r1 == pytest.approx(200 / 3)
    assert recalls(scores, belong, -scores).text_to_video == found.text_to_video


def own(video_of: Sequence[int]) -> Tensor:
    """Of each text one video."""
    return related(list(enumerate(video_of)), len(video_of), max(video_of) + 1)


def naive(similarity: list[list[float]], video_of: Sequence[int]) -> list[list[float]]:
    """The same by sorting each row and column, wrong ones first among equals."""
    texts, videos = range(len(similarity)), range(len(similarity[0]))
    places: list[list[int]] = [[], []]
    for t in texts:
        order = sorted(videos, key=lambda v: (-similarity[t][v], v == video_of[t]))
        places[0].append(order.index(video_of[t]))
    for v in videos:
        order = sorted(texts, key=lambda t: (-similarity[t][v], video_of[t] == v))
        best = min(i for i, t in enumerate(order) if video_of[t] == v)
        # its own captions that are no better do not stand before it
        places[1].append(sum(video_of[t] != v for t in order[:best]))
    return [[100 * sum(p < k for p in side) / len(side) for k in (1, 5, 10)] for side in places]


@given(st.data())
def test_recalls_are_those_of_sorting(data: st.DataObject) -> None:
    videos = data.draw(st.integers(1, 13))
    more = data.draw(st.lists(st.integers(0, videos - 1), max_size=12))
    video_of = data.draw(st.permutations([*range(videos), *more]))
    level = st.integers(-3, 3)  # few levels: many ties
    rows = data.draw(
        st.lists(st.lists(level, min_size=videos, max_size=videos), min_size=len(video_of), max_size=len(video_of))
    )
    found = recalls(torch.tensor(rows, dtype=torch.float32), own(video_of))
    texts, of_videos, both = found.text_to_video, found.video_to_text, found.harmonic
    wanted = naive(rows, video_of)
    assert [texts.r1, texts.r5, texts.r10] == pytest.approx(wanted[0])
    assert [of_videos.r1, of_videos.r5, of_videos.r10] == pytest.approx(wanted[1])
    for mean, a, b in zip((both.r1, both.r5, both.r10), *wanted, strict=True):
        assert mean == pytest.approx(0 if a * b == 0 else 1 / ((1 / a + 1 / b) / 2))


@pytest.mark.parametrize(
    "content",
    [
        {"a.mp4": ["one", "two"], "b.mp4": ["three"]},
        {"a.mp4": ["one", "two"], "b.mp4": "three"},
        [
            {"video": "a.mp4", "caption": "one"},
            {"video": "b.mp4", "caption": "three"},
            {"video": "a.mp4", "caption": "two"},
        ],
        [{"video": "a.mp4", "caption": ["one", "two"]}, {"video": "b.mp4", "caption": "three", "id": 3}],
    ],
)
def test_caption_files(tmp_path: Path, content: Any) -> None:
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert read_captions(tmp_path / "c.json") == {"a.mp4": ["one", "two"], "b.mp4": ["three"]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no JSON"),
        ("{}", "holds no captions"),
        ("[]", "holds no captions"),
        ("[1]", "holds no captions"),
        ('"a.mp4"', "holds no captions"),
        ('{"a.mp4": []}', "'a.mp4' has \\[\\] for captions"),
        ('{"a.mp4": ["  "]}', "for captions; write"),
        ('[{"file": "a.mp4", "caption": "x"}]', "None has \\['x'\\] for captions"),
    ],
)
def test_caption_files_that_are_none(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(EvaluationError, match=words):
        read_captions(tmp_path / "c.json")


class Colour:
    """Features are the mean colour; a text is a colour's name, or several. Stops in the middle if told to."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2), stop_at: int | None = None) -> None:
        self.order, self.stop_at = list(order), stop_at
        self.batches: list[int] = []

    def encode_videos(self, frames: Tensor) -> Tensor:
        if len(self.batches) == self.stop_at:
            raise KeyboardInterrupt
        self.batches.append(len(frames))
        return frames.mean((1, 3, 4))[:, self.order]

    def encode_texts(self, texts: list[str]) -> Tensor:
        return torch.stack([sum(torch.tensor(COLOURS[w]).float() for w in text.split()) for text in texts])


def as_float(frames: Tensor) -> Tensor:
    return frames.permute(0, 3, 1, 2) / 255


def video(path: Path, colour: tuple[int, ...], frames: int = 12) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        pixels = np.broadcast_to(np.array(colour, dtype=np.uint8), (32, 32, 3)).copy()
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def clips(tmp_path: Path) -> tuple[Path, Path]:
    """Four videos with five captions."""
    (tmp_path / "videos").mkdir()
    for name, colour in COLOURS.items():
        video(tmp_path / "videos" / f"{name}.mp4", colour)
    captions = {f"{name}.mp4": [name] for name in COLOURS}
    captions["white.mp4"].append("red green blue")
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    return tmp_path / "videos", tmp_path / "captions.json"


def run(clips: tuple[Path, Path], **options: Any) -> dict[str, RetrievalScores]:
    encoders = options.pop("encoders", None) or {"dense": Colour(), "swapped": Colour((1, 0, 2))}
    return evaluate_retrieval(encoders, *clips, as_float, **{"batch_size": 2, "workers": 0, **options})


def test_retrieval_by_colour(clips: tuple[Path, Path]) -> None:
    encoders = {"dense": Colour(), "swapped": Colour((1, 0, 2))}
    scores = run(clips, encoders=encoders)
    assert encoders["dense"].batches == encoders["swapped"].batches == [2, 2]
    every = Recalls(100, 100, 100)
    assert scores["dense"] == RetrievalScores(every, every, every, every, 4, 5, ())
    # red and green are taken for each other: 3 of 5 captions and 2 of 4 videos are found first
    assert (scores["swapped"].text_to_video.r1, scores["swapped"].video_to_text.r1) == (60, 50)
    assert scores["swapped"].harmonic == Recalls(pytest.approx(2 * 60 * 50 / 110), 100, 100)


def test_videos_that_cannot_be_read_are_left_out_with_their_captions(clips: tuple[Path, Path]) -> None:
    folder, _ = clips
    (folder / "white.mp4").write_bytes(b"no video")
    video(folder / "green.mp4", COLOURS["green"], frames=11)
    scores = run(clips, workers=2)["dense"]
    assert [s.file for s in scores.skipped] == ["green.mp4", "white.mp4"]
    assert "has 11 frames, 12 were asked for" in scores.skipped[0].reason
    assert (scores.videos, scores.captions, scores.harmonic) == (2, 2, Recalls(100, 100, 100))
    assert run(clips, frames=11)["dense"].videos == 3


def test_no_video_can_be_read(clips: tuple[Path, Path]) -> None:
    with pytest.raises(
        EvaluationError, match=r"none of the 4 videos in .* could be read; the first, red\.mp4: .*13 were"
    ):
        run(clips, frames=13)


@pytest.mark.parametrize("batches", [0, 1])
def test_an_interrupted_retrieval_goes_on(clips: tuple[Path, Path], tmp_path: Path, batches: int) -> None:
    whole, file = run(clips), tmp_path / "resume.json"
    with pytest.raises(KeyboardInterrupt):
        run(clips, encoders={"dense": Colour(), "swapped": Colour((1, 0, 2), stop_at=batches)}, resume=file)
    encoders = {"dense": Colour(), "swapped": Colour((1, 0, 2))}
    assert run(clips, encoders=encoders, resume=file) == whole
    assert len(encoders["dense"].batches) == 2 - batches
    with pytest.raises(EvaluationError, match="frames: 12 there, 6 here"):
        run(clips, resume=file, frames=6)


def test_the_resume_file_of_pictures_is_another(clips: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"identity": {"evaluation": "images"}}\n')
    with pytest.raises(EvaluationError, match='evaluation: "images" there, "retrieval" here'):
        run(clips, resume=tmp_path / "r.json")


def test_a_limit(clips: tuple[Path, Path]) -> None:
    assert (run(clips, limit=2)["dense"].videos, run(clips, limit=2)["dense"].captions) == (2, 2)


def test_captions_of_videos_that_are_not_there(clips: tuple[Path, Path], tmp_path: Path) -> None:
    folder, captions = clips
    captions.write_text(json.dumps({name: ["red"] for name in ("red.mp4", "a.mp4", "b.mp4", "c.mp4", "d.mp4")}))
    with pytest.raises(EvaluationError, match=r"not in .*videos: a\.mp4, b\.mp4, c\.mp4 and 1 more; put them there"):
        run(clips)
    with pytest.raises(EvaluationError, match=r"there is no folder .*nowhere"):
        run((tmp_path / "nowhere", captions))
    with pytest.raises(EvaluationError, match=r"nowhere.json cannot be read \(No such file"):
        run((folder, tmp_path / "nowhere.json"))


def test_features_that_do_not_fit(clips: tuple[Path, Path]) -> None:
    with pytest.raises(EvaluationError, match=r"dense gave features \[2, 2\] for 2 videos, of which texts have 3"):
        run(clips, encoders={"dense": Colour((0, 1))})
