"""UMT whole: its vision and text encoders with what retrieval and question answering put on them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.models.umt import SIZES, AttentionCode, Size, VisionEncoder
from bench.models.umt_text import AnswerDecoder, TextEncoder, TextSize
from rs_compile.models import ModelError, load_weights, read_weights


@dataclass(frozen=True)
class UmtSize:
    """Of UMT's parts.

    Args:
        vision, text: of the encoders.
        shared: channels of the space in which texts and videos are compared.
        frames, side: of the clips; the side in pixels.
    """

    vision: Size
    text: TextSize
    shared: int
    frames: int = 12
    side: int = 224


UMT_SIZES = {
    "b": UmtSize(SIZES["umt_b"], TextSize(768, 12, 12, fusion=9), 512),
    "l": UmtSize(SIZES["umt_l"], TextSize(1024, 24, 16, fusion=19), 768),
}
# what a checkpoint may hold beside the model: the teacher and the decoders of pretraining, a table of 0, 1, 2, ...
IGNORED = re.compile(
    r"clip_teacher\.|vision_encoder\.clip_decoder\.|text_(en|de)coder\.(bert\.)?embeddings\.position_ids$"
)
_WIDTH = "vision_encoder.encoder.patch_embed.proj.weight"
_PRETRAINED, _PRETRAINED_HEAD = "text_encoder.bert.", "text_encoder.cls."


class UmtRetrieval(nn.Module):
    """Videos and texts in one space, and a head that says whether a text and a video match.

    Args:
        size: of all parts.
        attention: of the vision encoder, see `bench.models.umt.Attention`.
    """

    def __init__(self, size: UmtSize, attention: AttentionCode = "eager") -> None:
        super().__init__()
        self.size = size
        self.vision_encoder = VisionEncoder(size.vision, size.frames, size.side, attention=attention)
        self.text_encoder = TextEncoder(size.text, size.vision.dim)
        self.vision_proj = nn.Linear(size.vision.dim, size.shared)
        self.text_proj = nn.Linear(size.text.dim, size.shared)
        self.temp = nn.Parameter(torch.tensor(0.07))  # of training alone
        self.itm_head = nn.Linear(size.text.dim, 2)

    def pooled(self, tokens: Tensor, frames: int = 1) -> Tensor:
        """Tokens [B, K, C] of the vision encoder -> [B, D] in the shared space, of length 1 where frames is 1.

        Args:
            tokens: those that are left, each counting once, also where it stands for several.
            frames: into how many parts of equal length to split them. Each is averaged and normalised by itself, as
                UMT's own retrieval does with its frames; a text's similarity is the mean of those to the parts.
        """
        means = self.vision_encoder.pool_norm(tokens.unflatten(1, (frames, -1)).mean(2))
        return nn.functional.normalize(self.vision_proj(means).float(), dim=-1).mean(1)

    def projected(self, text: Tensor) -> Tensor:
        """States [B, L, C] of `TextEncoder.text` -> [B, D] in the shared space, of length 1."""
        return nn.functional.normalize(self.text_proj(text[:, 0]).float(), dim=-1)

    def matching(self, text: Tensor, mask: Tensor, video: Tensor) -> Tensor:
        """Logits [B], float32, of the class "they match"; arguments as of `TextEncoder.fuse`."""
        logits: Tensor = self.itm_head(self.text_encoder.fuse(text, mask, video)[:, 0])[:, 1]
        return logits.float()


class UmtAnswering(nn.Module):
    """A video and a question -> how likely the tokens of an answer are.

    Args:
        size, attention: as of `UmtRetrieval`.
    """

    def __init__(self, size: UmtSize, attention: AttentionCode = "eager") -> None:
        super().__init__()
        self.size = size
        self.vision_encoder = VisionEncoder(size.vision, size.frames, size.side, pool_norm=False, attention=attention)
        self.text_encoder = TextEncoder(size.text, size.vision.dim)
        self.text_decoder = AnswerDecoder(size.text)


def load_umt(model: UmtRetrieval | UmtAnswering, path: Path) -> None:
    """Copies a checkpoint's weights into a model; every key must be the model's, but for those of `IGNORED`.

    A file of pretraining has "bert." in front of the text encoder's keys, and a head that predicts words: not read.

    Raises:
        ModelError: the file cannot be read, is of another size, or a key is missing, left over or of another shape.
    """
    weights = read_weights(path)
    _check_width(model.size, weights, path)
    if any(key.startswith(_PRETRAINED) for key in weights):
        if isinstance(model, UmtAnswering):
            raise ModelError(
                f"{path} is a file of pretraining, which has no answer decoder; give a checkpoint that was fine-tuned "
                "on question answering, qa_*.pth"
            )
        weights = {
            key.replace(_PRETRAINED, "text_encoder."): value
            for key, value in weights.items()
            if not key.startswith(_PRETRAINED_HEAD)
        }
    weights = {key: value for key, value in weights.items() if not IGNORED.match(key)}
    _check_tied(weights, path)
    load_weights(model, weights, path)


def _check_width(size: UmtSize, weights: Mapping[str, Tensor], path: Path) -> None:
    if _WIDTH not in weights:
        raise ModelError(
            f"{path} has no {_WIDTH}, so it is no checkpoint of a whole UMT; give one of ret_*.pth or qa_*.pth"
        )
    width = len(weights[_WIDTH])
    if width != size.vision.dim:
        names = [f"UMT-{name.upper()}" for name, known in UMT_SIZES.items() if known.vision.dim == width]
        of = f", that of {names[0]}" if names else ""
        raise ModelError(
            f"{path} has a vision encoder of width {width}{of}, the model one of {size.vision.dim}; give the file of "
            "that size (two of the published links lead to UMT-B's file in place of UMT-L's)"
        )


def _check_tied(weights: Mapping[str, Tensor], path: Path) -> None:
    """Of two keys for one weight the later would silently win."""
    head = "text_decoder.cls.predictions."
    pairs = (
        (f"{head}decoder.weight", "text_decoder.bert.embeddings.word_embeddings.weight"),
        (f"{head}decoder.bias", f"{head}bias"),
    )
    for one, other in pairs:
        if one in weights and other in weights and not torch.equal(weights[one], weights[other]):
            raise ModelError(f"{path}: {one} and {other} differ, which are one weight in UMT; the file is damaged")
