"""The models of the sweep at full size, with random weights, which speed does not depend on; small ones for --quick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from bench.models.umt import Size, VisionEncoder, umt
from rs_compile import ClassAttention, MeanAttention, Score

SIDE, QUICK_SIDE = 224, 64
WORDS = 256  # tokens of BERT's input
QUICK_DEPTH = 7  # blocks 0, 3 and 6 must be there


@dataclass(frozen=True)
class Network:
    """A model of the sweep.

    Args:
        name: in rows and options.
        make: builds it, small where its argument says so, in eval mode.
        inputs: of so many samples, for the small one or not; floating ones are of the sweep's dtype.
        blocks: after which tokens leave.
        attention: the score of the attention-score baseline: Eq. 2 with a class token that is no input, Eq. 3 without.
        written_out: the largest batch for which attention is written out; None for any. The map of 2352 tokens
            is 266 MB a sample in float32, several times over.
    """

    name: str
    make: Callable[[bool], nn.Module]
    inputs: Callable[[int, bool], Tensor]
    blocks: tuple[int, ...] = (0, 3, 6)
    attention: Score = ClassAttention()
    written_out: int | None = None


def _images(batch: int, quick: bool) -> Tensor:
    side = QUICK_SIDE if quick else SIDE
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def _timm(name: str, architecture: str, **quick_options: Any) -> Network:
    def make(quick: bool) -> nn.Module:
        small = {"img_size": QUICK_SIDE, "embed_dim": 48, "depth": QUICK_DEPTH, "num_heads": 3, **quick_options}
        return timm.create_model(architecture, **(small if quick else {})).eval()

    return Network(name, make, _images)


def _transformers(model: str, config: str, **options: Any) -> Callable[[bool], nn.Module]:
    def make(quick: bool) -> nn.Module:
        import transformers

        small = {"hidden_size": 48, "num_hidden_layers": QUICK_DEPTH, "num_attention_heads": 3, "intermediate_size": 96}
        if quick and "image_size" in options:
            small["image_size"] = QUICK_SIDE
        settings = getattr(transformers, config)(**{**options, **(small if quick else {})})
        return getattr(transformers, model)(settings).eval()

    return make


def _words(batch: int, quick: bool) -> Tensor:
    length = 32 if quick else WORDS
    return torch.randint(1000, 30000, (batch, length), generator=torch.Generator().manual_seed(0))


def _umt(quick: bool) -> nn.Module:
    return VisionEncoder(Size(48, 4, 3), frames=2, side=QUICK_SIDE).eval() if quick else umt("umt_b")


def _clips(batch: int, quick: bool) -> Tensor:
    frames, side = (2, QUICK_SIDE) if quick else (12, SIDE)
    return torch.randn(batch, 3, frames, side, side, generator=torch.Generator().manual_seed(0))


_CLIP = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
NETWORKS = {
    network.name: network
    for network in (
        _timm("DeiT-T", "deit_tiny_patch16_224"),
        _timm("DeiT-S", "deit_small_patch16_224"),
        _timm("DeiT-B", "deit_base_patch16_224"),
        Network(
            "CLIP ViT-B/16",
            _transformers("CLIPVisionModel", "CLIPVisionConfig", image_size=SIDE, patch_size=16, **_CLIP),
            _images,
        ),
        Network("UMT-B", _umt, _clips, blocks=(0, 1, 2), attention=MeanAttention(), written_out=4),
        _timm("DINOv3-S", "vit_small_patch16_dinov3"),
        _timm("BEiT-B", "beit_base_patch16_224"),
        Network("BERT-base", _transformers("BertModel", "BertConfig"), _words, attention=MeanAttention()),
    )
}
