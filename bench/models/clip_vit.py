"""A video ViT like UMT's encoder: a clip's frames as one sequence, no class token, the mean as output."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class ClipViT(nn.Module):
    """A clip [B, 3, T, H, W] -> features [B, C]; T * H/patch * W/patch tokens in (t, h, w) order.

    Args:
        frames, side: of the clip; the side in pixels.
        patch: side of a patch, one frame deep.
        dim, depth, heads: width, blocks, attention heads.
        fused: scaled_dot_product_attention; False for softmax(QK^T)V by hand, as in UMT's public code.
    """

    def __init__(
        self,
        frames: int = 12,
        side: int = 224,
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv3d(3, dim, (1, patch, patch), (1, patch, patch))
        self.register_buffer("pos_embed", sincos(frames * (side // patch) ** 2, dim), persistent=False)
        blocks = [Block(dim, heads, qkv_bias=True) for _ in range(depth)]
        for block in blocks:
            attention: Any = block.attn
            attention.fused_attn = fused  # timm's own switch between both spellings
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, clip: Tensor) -> Tensor:
        tokens = self.patch_embed(clip).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(tokens + self.pos_embed)).mean(1)


def sincos(positions: int, dim: int) -> Tensor:
    """[1, positions, dim]: on channel j sin (even) or cos (odd) of p / 10000^(2 floor(j/2) / dim)."""
    exponent = 2 * torch.div(torch.arange(dim), 2, rounding_mode="floor") / dim
    angle = torch.arange(positions).unsqueeze(1) / 10000**exponent
    return torch.where(torch.arange(dim) % 2 == 0, angle.sin(), angle.cos()).unsqueeze(0)
