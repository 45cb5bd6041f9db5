"""The models that the tables are about, and the small ones that stand in for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from bench.digits import SIDE, digits_vit, load_pretrained_digits_vit
from bench.models.umt import SIZES, Size, VisionEncoder, umt
from rs_compile import ClassAttention, MeanAttention, Score
from rs_compile.models import build

Make = Callable[[bool, Path | None], nn.Module]  # from pretrained, checkpoint
Data = Literal["digits", "images", "captions", "annotations", "answers", ""]
Paper = Mapping[str, Mapping[str, float]]  # method -> column -> figure

DIGITS = "digits ViT"
DEIT = {"DeiT-T": "tiny", "DeiT-S": "small", "DeiT-B": "base"}
UMT = {"UMT-B": "umt_b", "UMT-L": "umt_l"}
HEADS = {"tiny": 1, "small": 2, "base": 4}  # of the stand-ins, 16 channels each


@dataclass(frozen=True)
class Subject:
    """A model of a table.

    Args:
        name: in rows.
        make: builds it in eval mode, fp32: random weights unless pretrained or a checkpoint.
        shape: of one sample.
        keep: block -> keep ratio, the table's schedule.
        attention: its attention score, class attention (Eq. 2) or, without a class token, mean attention (Eq. 3).
        batch: samples of a timed call, on a CPU and elsewhere (the paper's).
        paper: what the paper prints, by method and column.
        data: what its accuracy can be measured on: pictures, or videos with captions (dual encoders), the annotations
            of a data set (UMT) or these and a list of answers (UMT for question answering).
        stand_in: whether it stands in for UMT with --quick.
    """

    name: str
    make: Make
    shape: tuple[int, ...]
    keep: Mapping[int, float]
    attention: Score
    batch: tuple[int, int] = (1, 1)
    paper: Paper = field(default_factory=dict)
    data: Data = ""
    stand_in: bool = False

    def on_meta(self) -> tuple[nn.Module, Tensor]:
        """The model and one sample without memory, for what needs no forward pass."""
        with torch.device("meta"):
            return self.make(False, None).to("meta"), torch.empty(1, *self.shape)


def deit(name: str, blocks: tuple[int, ...], ratio: float, paper: Paper, quick: bool) -> Subject:
    """DeiT-T, -S or -B, 224 x 224; quick: a narrow one of 7 blocks, 64 x 64."""
    size = DEIT[name]
    side = 64 if quick else 224

    def make(pretrained: bool, checkpoint: Path | None) -> nn.Module:
        if quick:
            heads = HEADS[size]
            options: dict[str, Any] = {"img_size": side, "embed_dim": 16 * heads, "depth": 7, "num_heads": heads}
            return timm.create_model("deit_tiny_patch16_224", **options).eval()
        return build(f"deit_{size}_patch16_224", pretrained=pretrained, checkpoint=checkpoint)

    keep = dict.fromkeys(blocks, ratio)
    return Subject(name, make, (3, side, side), keep, ClassAttention(), (16, 512), {} if quick else paper, "images")


def vision_size(name: str, quick: bool) -> Size:
    """Of UMT-B's or -L's vision encoder, or of its stand-in."""
    full = SIZES[UMT[name]]
    return Size(full.dim // 16, 3, full.heads // 4) if quick else full


def umt_encoder(name: str, blocks: tuple[int, ...], ratio: float, paper: Paper, quick: bool, qa: bool) -> Subject:
    """UMT-B or -L on 12 frames of 224 x 224; quick: a narrow one of 3 blocks on 2 of 64 x 64.

    Args:
        qa: as in question answering, without the norm on the pooled features.
    """
    frames, side = (2, 64) if quick else (12, 224)

    def make(_pretrained: bool, _checkpoint: Path | None) -> nn.Module:  # weights come with the text side's
        if quick:
            return VisionEncoder(vision_size(name, quick), frames, side, pool_norm=not qa).eval()
        return umt(UMT[name], pool_norm=not qa)

    keep = dict.fromkeys(blocks, ratio)
    return Subject(
        name,
        make,
        (3, frames, side, side),
        keep,
        MeanAttention(),
        (1, 20),
        {} if quick else paper,
        "answers" if qa else "annotations",
        quick,
    )


def digits(blocks: tuple[int, ...], ratio: float) -> Subject:
    """The demo's digits ViT (6 blocks, 101 tokens), which comes with its weights and data."""

    def make(pretrained: bool, checkpoint: Path | None) -> nn.Module:
        return load_pretrained_digits_vit() if pretrained else digits_vit().eval()

    keep = dict.fromkeys(blocks, ratio)
    return Subject(DIGITS, make, (1, SIDE, SIDE), keep, ClassAttention(), (64, 64), data="digits")


def dual_encoder(path: str, blocks: tuple[int, ...], ratio: float, pretrained: bool) -> Subject:
    """The vision tower of a dual encoder of transformers, for a frame; see `bench.evaluate.encoders`."""
    from bench.evaluate.encoders import load_encoder

    encoder, _ = load_encoder(path, pretrained=pretrained)
    tower = encoder.model.vision_model
    side = tower.config.image_size

    def make(_pretrained: bool, _checkpoint: Path | None) -> nn.Module:
        return copy.deepcopy(tower)

    keep = dict.fromkeys(blocks, ratio)
    return Subject(path, make, (3, side, side), keep, ClassAttention(), (12, 240), data="captions")
