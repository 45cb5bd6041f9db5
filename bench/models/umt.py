"""UMT's vision encoders (Li et al., ICCV 2023), named as in their public code, so that its checkpoints load.

A clip of T frames is one sequence of T * (side/patch)^2 tokens in (t, h, w) order, without a class token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rs_compile.models import load_weights, read_weights

AttentionCode = Literal["eager", "sdpa"]

PREFIX = "vision_encoder."  # of the encoder's keys in a checkpoint that holds the text encoder too
EPS = 1e-6


@dataclass(frozen=True)
class Size:
    """Width, blocks and attention heads of an encoder."""

    dim: int
    depth: int
    heads: int


SIZES = {"umt_b": Size(768, 12, 12), "umt_l": Size(1024, 24, 16)}


class Attention(nn.Module):
    """Self-attention [B, N, C] -> [B, N, C]; the bias of q, k, v is [q_bias, 0, v_bias].

    Args:
        dim, heads: channels, and into how many heads they are split.
        code: "eager" writes softmax(QK^T)V out, as the public code does; "sdpa" calls the fused op.
    """

    def __init__(self, dim: int, heads: int, code: AttentionCode) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.fused_attn = code == "sdpa"  # named as timm names its switch
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.reshape(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            q = q * self.scale
            mixed = self.attn_drop((q @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return self.proj(mixed.transpose(1, 2).reshape(B, N, -1))


class Mlp(nn.Module):
    """[B, N, C] -> [B, N, C] through four times the channels and the exact GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm block [B, N, C] -> [B, N, C]: attention, then MLP, each added to the stream."""

    def __init__(self, dim: int, heads: int, code: AttentionCode) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads, code)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A clip [B, 3, T, H, W] -> tokens [B, T * H/patch * W/patch, C]; a patch is one frame deep."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, dim, (1, patch, patch), (1, patch, patch))

    def forward(self, clip: Tensor) -> Tensor:
        return self.proj(clip).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """A clip [B, 3, T, side, side] -> normalised tokens [B, N, C]."""

    pos_embed: Tensor

    def __init__(self, size: Size, frames: int, side: int, patch: int, code: AttentionCode) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(size.dim, patch)
        self.register_buffer("pos_embed", sincos(frames * (side // patch) ** 2, size.dim), persistent=False)
        self.blocks = nn.ModuleList(Block(size.dim, size.heads, code) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.dim, eps=EPS)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.patch_embed(clip)
        x = x + self.pos_embed.type_as(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class VisionEncoder(nn.Module):
    """A clip [B, 3, T, side, side] -> features [B, C], the mean of its tokens.

    Args:
        size: width, depth and heads.
        frames, side: of the clip; the side in pixels.
        patch: side of a patch in pixels.
        pool_norm: a LayerNorm on the mean (retrieval); question answering has none.
        attention: see `Attention`.
    """

    def __init__(
        self,
        size: Size,
        frames: int = 12,
        side: int = 224,
        patch: int = 16,
        pool_norm: bool = True,
        attention: AttentionCode = "eager",
    ) -> None:
        super().__init__()
        self.encoder = Encoder(size, frames, side, patch, attention)
        self.pool_norm: nn.Module = nn.LayerNorm(size.dim, eps=EPS) if pool_norm else nn.Identity()

    def forward(self, clip: Tensor) -> Tensor:
        return self.pool_norm(self.encoder(clip).mean(1))


def umt(
    name: str,
    *,
    frames: int = 12,
    side: int = 224,
    pool_norm: bool = True,
    attention: AttentionCode = "eager",
    depth: int | None = None,
) -> VisionEncoder:
    """UMT-B ("umt_b") or UMT-L ("umt_l") with random weights, in eval mode.

    Args:
        name: "umt_b" or "umt_l".
        frames, side: of the clips; the side in pixels.
        pool_norm: True as in retrieval, False as in question answering.
        attention: "eager" as published, or "sdpa".
        depth: fewer blocks than the published encoder has, for trying.

    Raises:
        ValueError: no such encoder or attention.
    """
    if name not in SIZES:
        raise ValueError(f"there is no encoder {name!r}; write one of {', '.join(SIZES)}")
    if attention not in get_args(AttentionCode):
        raise ValueError(f'attention is {attention!r}; write "eager" or "sdpa"')
    size = SIZES[name]
    size = Size(size.dim, size.depth if depth is None else depth, size.heads)
    return VisionEncoder(size, frames, side, pool_norm=pool_norm, attention=attention).eval()


def load_checkpoint(model: VisionEncoder, path: Path) -> None:
    """Copies the vision encoder's weights of a checkpoint into `model`; every one of its keys must fit.

    Where any key starts with "vision_encoder." the file is a whole model's: the keys with that prefix are the
    encoder's, and the others (text encoder, projections, matching head) are not looked at. Where none does,
    every key must be the encoder's.

    Args:
        model: an encoder of the checkpoint's size.
        path: a .safetensors file or one of torch.save's (read with weights_only), with the weights at the
            top or under "model".

    Raises:
        ModelError: the file cannot be read, or a key is missing, left over or of another shape; names it.
    """
    weights = read_weights(path)
    own = {key.removeprefix(PREFIX): value for key, value in weights.items() if key.startswith(PREFIX)}
    load_weights(model, own or weights, path)


def sincos(positions: int, dim: int) -> Tensor:
    """float32 [1, positions, dim]: channel j has sin (even j) or cos (odd j) of p / 10000^(2 floor(j/2) / dim)."""
    channel = torch.arange(dim, dtype=torch.float64)
    # doubles, as the public code's NumPy table: angles go up to the number of tokens
    exponent = 2 * torch.div(channel, 2, rounding_mode="floor") / dim
    angle = torch.arange(positions, dtype=torch.float64).unsqueeze(1) / 10000**exponent
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float().unsqueeze(0)
