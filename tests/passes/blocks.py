"""Small blocks of attention and MLP in every spelling of a residual sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 8


class Attention(nn.Module):
    def __init__(self, token_first: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.token_first = token_first

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.token_first else x
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, WIDTH))
        return x.transpose(0, 1) if self.token_first else x


class MLP(nn.Module):
    """Two linear layers; "swiglu" has a gate, "sub-norm" a norm of the hidden channels."""

    def __init__(self, kind: str = "gelu", hidden: int = 12) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.gate, self.down = (
            nn.Linear(WIDTH, hidden), nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH),
        )  # fmt: skip
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        y = F.gelu(self.up(x))
        if self.kind == "grn":  # an inner residual: y + y * (how large y is among its channels)
            y = y + y * (y.norm(dim=-1, keepdim=True) + self.gate(x).tanh())
        if self.kind == "inner":  # an inner residual of linear layers
            y = y + self.up(self.down(y))
        return self.down(self.norm(y) if self.kind == "sub-norm" else y)


class Block(nn.Module):
    def __init__(self, order: str = "pre", mlp: str = "gelu", scale: bool = False, token_first: bool = False) -> None:
        super().__init__()
        self.order = order
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(token_first), MLP(mlp)
        self.scale1, self.scale2 = (nn.Parameter(torch.ones(WIDTH)) if scale else 1.0 for _ in range(2))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "post":
            x = self.norm1(x + self.attn(x))
            return self.norm2(x + self.mlp(x))
        if self.order == "parallel":
            y = self.norm1(x)
            return x + self.attn(y) + self.mlp(y)
        if self.order == "parallel, inner sum":
            y = self.norm1(x)
            return x + (self.attn(y) + self.mlp(y))
        if self.order == "mlp first":
            x = x + self.mlp(self.norm1(x))
            return x + self.attn(self.norm2(x))
        if self.order == "branch on the left":
            x = self.attn(self.norm1(x)) + x
            return self.mlp(self.norm2(x)) + x
        if self.order == "norm on the branch":  # Swin V2
            x = x + self.norm1(self.attn(x))
            return x + self.norm2(self.mlp(x))
        x = x + self.drop(self.scale1 * self.attn(self.norm1(x)))
        return x + self.drop(self.scale2 * self.mlp(self.norm2(x)))


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module, head: Callable[[Tensor], Tensor] = lambda x: x.mean(1)) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), head

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5  # the patch embedding
        for block in self.blocks:
            x = block(x)
        return self.head(x)
