"""A made-up world for UMT: shapes that move over photographs, captions that say which, and a UMT that learns it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import skimage
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from bench.evaluate.frames import middles
from bench.evaluate.umt.answers import answer_tokens
from bench.evaluate.umt.pixels import DEVIATION, MEAN
from bench.evaluate.umt.tokens import PAD, Tokenizer, Tokens, normalised
from bench.models.umt import Size
from bench.models.umt_tasks import UmtAnswering, UmtRetrieval, UmtSize
from bench.models.umt_text import TextSize

COLOURS = {"red": (230, 30, 30), "green": (30, 220, 30), "blue": (40, 40, 240), "yellow": (240, 240, 30)}
SHAPES = ("disc", "square", "bar")
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg")
SIDE, LENGTH = 64, 16  # pixels of a frame, frames of a video
# the widths of the two encoders differ, so that neither is taken for the other
TINY = UmtSize(Size(64, 3, 4), TextSize(48, 3, 4, fusion=2), 32, frames=4, side=SIDE)
WORDS = ["a", "moves", "which", "colour", "shape", "is", "it", "where", "does", "go", "s", *COLOURS, *SHAPES, *WAYS]


@dataclass(frozen=True)
class Scene:
    """What is to be seen in a video."""

    colour: str
    shape: str
    way: str

    @property
    def caption(self) -> str:
        return f"A {self.colour} {self.shape} moves {self.way}."

    @property
    def questions(self) -> tuple[tuple[str, str], ...]:
        return (
            ("Which colour is it?", self.colour),
            ("which shape is it", self.shape),
            ("where does it go", f"moves {self.way}"),
        )

    @property
    def name(self) -> str:
        return f"{self.colour}-{self.shape}-{self.way}.mkv"


def scenes(colours: Sequence[str] = tuple(COLOURS), ways: Sequence[str] = tuple(WAYS)) -> list[Scene]:
    return [Scene(*parts) for parts in itertools.product(colours, SHAPES, ways)]


FEW = [scene for i, scene in enumerate(scenes()) if i % 4 == i // 4 % 4]  # 12, each colour and shape with a way


def photographs() -> list[np.ndarray]:
    """Pictures of 160 x 160."""
    folder = Path(skimage.__file__).parent / "data"
    return [np.asarray(Image.open(folder / name).convert("RGB").resize((160, 160))) for name in PHOTOGRAPHS]


def filmed(
    scene: Scene, random: np.random.RandomState, pictures: list[np.ndarray], times: Sequence[int] = range(LENGTH)
) -> np.ndarray:
    """Frames of the scene at these times, uint8 [T, SIDE, SIDE, 3], on a part of a photograph, starting anywhere."""
    y, x = random.randint(0, 160 - SIDE, 2)
    ground = pictures[random.randint(len(pictures))][y : y + SIDE, x : x + SIDE] // 3
    rows, columns = np.mgrid[:SIDE, :SIDE]
    start = random.randint(24, 40, 2) - np.array(WAYS[scene.way]) * 16
    frames = []
    for t in times:
        v, h = start + np.array(WAYS[scene.way]) * 2 * t
        down, across = rows - v, columns - h
        seen = {
            "disc": down**2 + across**2 < 250,
            "square": (abs(down) < 15) & (abs(across) < 15),
            "bar": (abs(down) < 4) & (abs(across) < 28),
        }[scene.shape]
        frames.append(np.where(seen[..., None], np.array(COLOURS[scene.colour], dtype=np.uint8), ground))
    return np.stack(frames)


def write_video(path: Path, frames: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(8))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_world(folder: Path, shown: Sequence[Scene], kinds: int = 3, seed: int = 1) -> None:
    """videos/, captions.json, questions.json (the first `kinds` a scene), answers.json, the tokenizer's text/."""
    random, pictures = np.random.RandomState(seed), photographs()
    (folder / "videos").mkdir(parents=True)
    for scene in shown:
        write_video(folder / "videos" / scene.name, filmed(scene, random, pictures))
    captions = [{"video": scene.name, "caption": scene.caption} for scene in shown]
    (folder / "captions.json").write_text(json.dumps(captions))
    questions = [
        {"video": scene.name, "question": question, "answer": answer, "question_id": i}
        for i, (scene, (question, answer)) in enumerate((s, q) for s in shown for q in s.questions[:kinds])
    ]
    (folder / "questions.json").write_text(json.dumps(questions))
    (folder / "answers.json").write_text(json.dumps([*COLOURS, *SHAPES, *(f"moves {way}" for way in WAYS)]))
    write_vocabulary(folder / "text")


def write_vocabulary(folder: Path) -> None:
    """As long as bert-base-uncased's, with its marks in their places."""
    folder.mkdir(parents=True)
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    words += [f"[more{i}]" for i in range(30522 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


def tiny(kind: type[nn.Module], size: UmtSize = TINY, seed: int = 0) -> nn.Module:
    """A model with BERT's initial weights."""
    torch.manual_seed(seed)
    model = kind(size)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.05)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


class Films:
    """Batches of clips of some scenes, each scene once a batch, never the same twice."""

    def __init__(self, shown: Sequence[Scene], size: UmtSize = TINY) -> None:
        self.shown, self.size = list(shown), size
        self.random, self.pictures = np.random.RandomState(0), photographs()

    def batch(self, count: int) -> tuple[list[Scene], Tensor]:
        """Scenes, and their clips [B, 3, T, side, side]."""
        chosen = [self.shown[i] for i in self.random.permutation(len(self.shown))[:count]]
        clips = []
        for scene in chosen:
            clips.append(filmed(scene, self.random, self.pictures, middles(LENGTH, self.size.frames)))
        pixels = torch.from_numpy(np.stack(clips)).float() / 255  # of the encoder's size already
        return chosen, ((pixels - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(0, 4, 1, 2, 3)


def train_answering(
    model: UmtAnswering, tokenizer: Tokenizer, shown: Sequence[Scene], steps: int, kinds: int = 3, batch: int = 12
) -> None:
    """Each clip with one of its first `kinds` questions; the loss of the answer's tokens."""
    films = Films(shown, model.size)
    model.text_encoder.embeddings.word_embeddings.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        chosen, clips = films.batch(batch)
        pairs = [scene.questions[films.random.randint(kinds)] for scene in chosen]
        question = Tokens.of(tokenizer, [normalised(text) for text, _ in pairs], 25)
        answer = answer_tokens(tokenizer, [text for _, text in pairs])
        video = model.vision_encoder.encoder(clips)
        states = model.text_encoder.fuse(model.text_encoder.text(question.ids, question.mask), question.mask, video)
        logits = model.text_decoder(answer.ids[:, :-1], answer.mask[:, :-1], states, question.mask)
        loss = F.cross_entropy(logits.flatten(0, 1), answer.ids[:, 1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def train_retrieval(
    model: UmtRetrieval, tokenizer: Tokenizer, shown: Sequence[Scene], steps: int, batch: int = 32, rate: float = 1e-3
) -> None:
    """Each clip against each caption of its batch, by similarity and by the matching logit."""
    films = Films(shown, model.size)
    model.text_encoder.embeddings.word_embeddings.requires_grad_(False)  # long, and the words are few
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for _ in range(steps):
        chosen, clips = films.batch(batch)
        tokens = Tokens.of(tokenizer, [normalised(scene.caption) for scene in chosen], 32)
        video, text = model.vision_encoder.encoder(clips), model.text_encoder.text(tokens.ids, tokens.mask)
        similarity = model.projected(text) @ model.pooled(video).T / model.temp.clamp(0.01, 0.5)
        own = torch.arange(len(chosen))
        loss = F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)
        matches = model.matching(text.repeat(len(own), 1, 1), tokens.mask.repeat(len(own), 1), video)
        matches = matches.view(len(own), len(own))
        loss = loss + F.cross_entropy(matches, own) + F.cross_entropy(matches.T, own)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
