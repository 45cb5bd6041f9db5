"""The demo's model: a small ViT that names the digit on a picture of `rs_compile.demo.pictures`."""

from __future__ import annotations

from importlib.resources import files

import safetensors.torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from rs_compile.demo.pictures import SIDE

PATCH = 4  # pixels
WIDTH, DEPTH, HEADS = 96, 6, 3


def demo_vit() -> VisionTransformer:
    """timm's VisionTransformer with a convolutional stem, untrained: [B, 3, 56, 56] -> logits [B, 10]; 14 x 14 patches
    and a class token.

    The stem (Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021) is what lets so few pictures
    train it in minutes.
    """
    model = VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        num_classes=10,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=2.0,
    )
    model.patch_embed.proj = nn.Sequential(
        _convolution(3, 24, stride=2),
        _convolution(24, 48, stride=2),
        _convolution(48, WIDTH, stride=1),
        nn.Conv2d(WIDTH, WIDTH, 1),
    )
    return model


def load_pretrained_demo_vit() -> VisionTransformer:
    """`demo_vit` with the weights that come with this package, float16 in the file and float32 here, in eval mode.

    They were made by `bench/train_demo.py`, without any token pruning or dropping.
    """
    weights = safetensors.torch.load(files("rs_compile").joinpath("data", "demo_vit.safetensors").read_bytes())
    model = demo_vit()
    model.load_state_dict(weights, strict=True)
    return model.eval()


def _convolution(channels: int, to: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, to, 3, stride, 1, bias=False), nn.BatchNorm2d(to), nn.ReLU())
