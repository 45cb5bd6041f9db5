"""Small generated vision transformers for the property tests, each with its own hand-pruned forward.

`GeneratedViT.forward` is written the many ways in which people write attention; `forward_pruned` is written
in one plain way, so that a mistake has to be made twice to stay hidden. Shapes: B samples, N tokens,
C channels, H heads.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 2
ATTENTIONS = (
    "sdpa",
    "scale-query",
    "scale-after",
    "division",
    "bmm",
    "baddbmm",
    "einsum",
    "fp32-softmax",
)
OUTPUTS = ("class", "mean", "patch-mean", "tokens")


@dataclass(frozen=True)
class Config:
    """What a generated model looks like.

    Args:
        grid: patches down and across.
        prefix: tokens in front of the patches: the first a class token, the rest registers.
        output: class token, mean over all tokens or over patches only (through a head), or all tokens.
        mask: "none", an N x N "buffer", an N x N table "computed" in the forward from arange(N), or an
            N x N "boolean" buffer.
        position_bias: a learned bias [H, N, N] on the attention logits.
        rope: rotary positions on the patch tokens only, by slice and cat.
        parallel: "none", "left" for (x + attention) + mlp, "inner" for x + (attention + mlp), with one norm.
        autocast_off: attention runs inside `torch.autocast("cpu", enabled=False)`.
        tables_no_grad: RoPE tables and the computed mask are made inside `torch.no_grad()`.
    """

    depth: int = 2
    width: int = 16
    heads: int = 2
    grid: tuple[int, int] = (3, 4)
    prefix: int = 1
    output: str = "class"
    norm: str = "pre"
    layer_scale: bool = False
    mlp: str = "gelu"
    fused_qkv: bool = True
    attention: str = "sdpa"
    mask: str = "none"
    position_bias: bool = False
    rope: bool = False
    parallel: str = "none"
    autocast_off: bool = False
    tables_no_grad: bool = False
    seed: int = 0

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        return self.prefix + self.patches


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def distance_mask(tokens: int) -> Tensor:
    """[N, N]: a penalty that grows with the distance of the tokens, and a few pairs that never meet."""
    place = torch.arange(tokens)
    apart = (place[:, None] - place[None, :]).abs()
    return apart.float() * -0.1 + torch.where((apart > 0) & (apart % 5 == 0), -1e4, 0.0)


def reach_mask(tokens: int) -> Tensor:
    """[N, N] bool: which pairs of tokens may meet; each token may meet itself."""
    return distance_mask(tokens) > -1e3


def rotary_tables(patches: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [patches, head_dim], half by half."""
    frequency = 1.0 / 30.0 ** (torch.arange(head_dim // 2) * 2 / head_dim)
    angle = torch.arange(patches)[:, None] * frequency[None, :]
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class GeneratedAttention(nn.Module):
    """Attention in the spelling that the config names."""

    mask: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config.width
        self.config = config
        self.head_dim = c // config.heads
        self.scale = self.head_dim**-0.5
        if config.fused_qkv:
            self.qkv = nn.Linear(c, 3 * c)
        else:
            self.q, self.k, self.v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.proj = nn.Linear(c, c)
        if config.mask == "buffer":
            self.register_buffer("mask", distance_mask(config.tokens))
        elif config.mask == "boolean":
            self.register_buffer("mask", reach_mask(config.tokens))
        if config.position_bias:
            self.bias = nn.Parameter(torch.zeros(config.heads, config.tokens, config.tokens))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, c = x.shape
        heads = self.config.heads
        if self.config.fused_qkv:
            q, k, v = self.qkv(x).reshape(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        q, k, v = (p(x).view(b, n, heads, c // heads).transpose(1, 2) for p in (self.q, self.k, self.v))
        return q, k, v

    def additive(self, tokens: int) -> Tensor | None:
        """What is added to the logits: [N, N], [H, N, N] or nothing."""
        parts = []
        if self.config.mask == "buffer":
            parts.append(self.mask)
        elif self.config.mask == "computed":
            with torch.no_grad() if self.config.tables_no_grad else contextlib.nullcontext():
                parts.append(distance_mask(tokens))
        if self.config.position_bias:
            parts.append(self.bias)
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def with_rope(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if not self.config.rope:
            return q, k
        p = self.config.prefix
        with torch.no_grad() if self.config.tables_no_grad else contextlib.nullcontext():
            cos, sin = rotary_tables(self.config.patches, self.head_dim)
        q = torch.cat([q[:, :, :p], rotate(q[:, :, p:], cos, sin)], dim=2)
        k = torch.cat([k[:, :, :p], rotate(k[:, :, p:], cos, sin)], dim=2)
        return q, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None) -> Tensor:
        b, h, n, d = q.shape
        how = self.config.attention
        reach = self.mask if self.config.mask == "boolean" else None
        if how == "sdpa":
            if reach is not None:  # with a bias as well, the boolean mask has to become additive
                extra = reach if extra is None else extra.masked_fill(~reach, -math.inf)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=extra)
        if how in ("bmm", "baddbmm"):
            q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
            if how == "bmm":
                logits = torch.bmm(q * self.scale, k.transpose(1, 2))
            else:
                start = torch.zeros(b * h, n, n)
                logits = torch.baddbmm(start, q, k.transpose(1, 2), beta=0, alpha=self.scale)
            if extra is not None:
                logits = (logits.view(b, h, n, n) + extra).view(b * h, n, n)
            if reach is not None:
                logits = logits.masked_fill(~reach, -math.inf)
            return torch.bmm(F.softmax(logits, dim=-1), v).view(b, h, n, d)
        if how == "einsum":
            logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.scale
        elif how == "scale-query":
            logits = (q * self.scale) @ k.transpose(-2, -1)
        elif how == "division":
            logits = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(d)
        else:
            logits = (q @ k.transpose(-2, -1)) * self.scale
        if extra is not None:
            logits = logits + extra
        if reach is not None:
            logits = logits.masked_fill(~reach, -math.inf)
        if how == "fp32-softmax":
            weights = F.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype)
        else:
            weights = logits.softmax(dim=-1)
        if how == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", weights, v)
        return weights @ v

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.project(x)
        with torch.autocast("cpu", enabled=False) if self.config.autocast_off else contextlib.nullcontext():
            q, k = self.with_rope(q, k)
            y = self.attend(q, k, v, self.additive(n))
        return self.proj(y.transpose(1, 2).reshape(b, n, c))

    def forward_short(self, x: Tensor, index: Tensor) -> Tensor:
        """The same on n tokens whose original positions are index [B, n]: plain softmax attention."""
        b, n, c = x.shape
        q, k, v = self.project(x)
        p = self.config.prefix
        if self.config.rope:
            cos, sin = (
                torch.cat([prefix, table])[index].unsqueeze(1)  # [B, 1, n, d]; prefix tokens are not turned
                for prefix, table in zip(
                    (torch.ones(p, self.head_dim), torch.zeros(p, self.head_dim)),
                    rotary_tables(self.config.patches, self.head_dim),
                    strict=True,
                )
            )
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        logits = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        rows, columns = index[:, :, None], index[:, None, :]
        if self.config.mask == "boolean":
            reach = reach_mask(self.config.tokens)[rows, columns][:, None]
            logits = torch.where(reach, logits, -math.inf)
        elif self.config.mask != "none":
            logits = logits + distance_mask(self.config.tokens)[rows, columns][:, None]
        if self.config.position_bias:
            logits = logits + self.bias[:, rows, columns].transpose(0, 1)
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class GeneratedBlock(nn.Module):
    """Attention and MLP, pre-norm, post-norm or parallel."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config.width
        self.config = config
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.attn = GeneratedAttention(config)
        self.mlp: nn.Module
        if config.mlp == "swiglu":
            self.mlp = GatedMLP(c)
        else:
            self.mlp = nn.Sequential(nn.Linear(c, 3 * c), nn.GELU(), nn.Linear(3 * c, c))
        if config.layer_scale:
            self.gamma1, self.gamma2 = nn.Parameter(torch.ones(c)), nn.Parameter(torch.ones(c))

    def scaled(self, y: Tensor, which: int) -> Tensor:
        return y * (self.gamma1 if which == 1 else self.gamma2) if self.config.layer_scale else y

    def forward(self, x: Tensor) -> Tensor:
        if self.config.parallel != "none":
            y = self.norm1(x)
            attention, mlp = self.scaled(self.attn(y), 1), self.scaled(self.mlp(y), 2)
            return x + attention + mlp if self.config.parallel == "left" else x + (attention + mlp)
        if self.config.norm == "post":
            x = self.norm1(x + self.scaled(self.attn(x), 1))
            return self.norm2(x + self.scaled(self.mlp(x), 2))
        x = x + self.scaled(self.attn(self.norm1(x)), 1)
        return x + self.scaled(self.mlp(self.norm2(x)), 2)


class GeneratedViT(nn.Module):
    """Images [B, 3, 2h, 2w] to [B, 7] through a head, or to tokens [B, N, C]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config.width
        self.config = config
        self.patch_embed = nn.Conv2d(3, c, PATCH, PATCH)
        if config.prefix > 0:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, c))
        if config.prefix > 1:
            self.registers = nn.Parameter(torch.zeros(1, config.prefix - 1, c))
        self.position = nn.Parameter(torch.zeros(1, config.tokens, c))
        self.blocks = nn.ModuleList([GeneratedBlock(config) for _ in range(config.depth)])
        self.norm: nn.Module = nn.LayerNorm(c) if config.norm == "pre" else nn.Identity()
        self.head: nn.Module = nn.Identity() if config.output == "tokens" else nn.Linear(c, 7)
        oracle.randomise(self, config.seed)
        self.eval()

    def images(self, batch: int, seed: int = 1) -> Tensor:
        h, w = self.config.grid
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, PATCH * h, PATCH * w, generator=generator)

    def typed_blocks(self) -> list[GeneratedBlock]:
        return [block for block in self.blocks if isinstance(block, GeneratedBlock)]

    def embed(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        front = []
        if self.config.prefix > 0:
            front.append(self.cls_token.expand(x.shape[0], -1, -1))
        if self.config.prefix > 1:
            front.append(self.registers.expand(x.shape[0], -1, -1))
        return (torch.cat([*front, x], dim=1) if front else x) + self.position

    def read_out(self, x: Tensor) -> Tensor:
        if self.config.output == "class":
            x = x[:, 0]
        elif self.config.output == "mean":
            x = x.mean(dim=1)
        elif self.config.output == "patch-mean":
            x = x[:, self.config.prefix :].mean(dim=1)
        return self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.read_out(self.norm(x))

    def forward_pruned(self, images: Tensor, pruning: oracle.Pruning) -> oracle.Result:
        """The oracle: hand-pruned after each scheduled block's last sum, all prefix tokens protected.

        A post-norm model's stream is its sums: what a token leaves with is the sum, and its norm comes after.
        """
        stream = oracle.Stream(self.embed(images))
        after: nn.Module = nn.Identity()  # the norm that post-norm puts behind the last sum
        for i, block in enumerate(self.typed_blocks()):
            start = after(stream.tokens)
            if self.config.parallel != "none":  # both branches read, and are compared with, the same stream
                y = block.norm1(start)
                middle = start
                attention = block.scaled(block.attn.forward_short(y, stream.index), 1)
                mlp = block.scaled(block.mlp(y), 2)
                end = start + attention + mlp
            elif self.config.norm == "post":
                attention = block.scaled(block.attn.forward_short(start, stream.index), 1)
                middle = block.norm1(start + attention)
                mlp = block.scaled(block.mlp(middle), 2)
                end = middle + mlp
                after = block.norm2
            else:
                attention = block.scaled(block.attn.forward_short(block.norm1(start), stream.index), 1)
                middle = start + attention
                mlp = block.scaled(block.mlp(block.norm2(middle)), 2)
                end = middle + mlp
            stream.tokens = end
            if i in pruning.keep:
                score = oracle.score_of(pruning, start, attention, middle, mlp, end)
                stream.prune(score, pruning.keep[i], self.config.prefix, pruning.lowest)
        x = stream.restored() if self.config.output == "tokens" else stream.tokens
        return oracle.result(stream, output=self.read_out(self.norm(after(x))))
