"""Vision Mamba (Zhu et al. 2024) with the class token in the middle, under the key names of its public checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.models.selective_scan import causal_conv1d, selective_scan


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) * weight over the channels, in float32. The model counts it as free, so it is
    written out: the norm op counts 5 an element."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        return scaled.to(self.weight.dtype) * self.weight


class Mixer(nn.Module):
    """The bidirectional mixer: one projection in, a scan in each direction, one projection out; [B, N, C] both ways.

    Args:
        dim: C; the scans have 2 C channels.
        states: S, of each channel.
        taps: of the convolution along the tokens.
    """

    conv1d: nn.Conv1d
    conv1d_b: nn.Conv1d
    x_proj: nn.Linear
    x_proj_b: nn.Linear
    dt_proj: nn.Linear
    dt_proj_b: nn.Linear
    A_log: Tensor
    A_b_log: Tensor
    D: Tensor
    D_b: Tensor

    def __init__(self, dim: int, states: int = 16, taps: int = 4) -> None:
        super().__init__()
        inner, self.rank, self.states = 2 * dim, math.ceil(dim / 16), states
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        for suffix in ("", "_b"):
            setattr(self, f"A{suffix}_log", nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1)))
            setattr(self, f"D{suffix}", nn.Parameter(torch.ones(inner)))
            setattr(self, f"conv1d{suffix}", nn.Conv1d(inner, inner, taps, groups=inner))
            setattr(self, f"x_proj{suffix}", nn.Linear(inner, self.rank + 2 * states, bias=False))
            setattr(self, f"dt_proj{suffix}", _dt_proj(self.rank, inner))

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        gate = F.silu(z)
        forward = self._scan(x, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D, False)
        backward = self._scan(x, self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, True)
        return self.out_proj((forward * gate + backward * gate) / 2)

    def _scan(
        self,
        x: Tensor,
        conv: nn.Conv1d,
        x_proj: nn.Linear,
        dt_proj: nn.Linear,
        A_log: Tensor,
        D: Tensor,
        reverse: bool,
    ) -> Tensor:
        """One direction, [B, N, 2 C] both ways."""
        x = F.silu(causal_conv1d(x, conv.weight, conv.bias, reverse))
        dt, B, C = x_proj(x).split([self.rank, self.states, self.states], dim=-1)
        delta = F.softplus(dt_proj(dt))
        return selective_scan(x, delta, -torch.exp(A_log.float()), B, C, None, reverse) + D * x


class Layer(nn.Module):
    """Add, norm, mixer. The sum of one layer is taken at the entry of the next, in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.mixer = RMSNorm(dim), Mixer(dim)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else hidden + residual
        return self.mixer(self.norm(residual)), residual.float()


class VisionMamba(nn.Module):
    """Images [B, channels, side, side] -> logits [B, classes]. The defaults are ViM-T, 7.148M parameters.

    The class token stands in the middle of the patches (98th of 197) and is what the head reads.

    Args:
        side: of the images, in pixels.
        patch: side of a patch.
        channels: of the images.
        classes: of the head.
        dim: C, the width.
        depth: layers.
    """

    def __init__(
        self, side: int = 224, patch: int = 16, channels: int = 3, classes: int = 1000, dim: int = 192, depth: int = 24
    ) -> None:
        super().__init__()
        patches = (side // patch) ** 2
        self.middle = patches // 2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, dim, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, dim))
        self.layers = nn.ModuleList([Layer(dim) for _ in range(depth)])
        self.norm_f = RMSNorm(dim)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        class_token = self.cls_token.expand(x.shape[0], -1, -1)
        hidden = torch.cat([x[:, : self.middle], class_token, x[:, self.middle :]], dim=1) + self.pos_embed
        residual: Tensor | None = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        stream = hidden if residual is None else hidden + residual
        return self.head(self.norm_f(stream)[:, self.middle])


def _dt_proj(rank: int, inner: int) -> nn.Linear:
    """Its bias lets delta start between 0.001 and 0.1, evenly on a log scale, as Mamba does."""
    layer = nn.Linear(rank, inner)
    dt = torch.exp(torch.rand(inner) * math.log(100) + math.log(0.001))
    with torch.no_grad():
        layer.weight.uniform_(-(rank**-0.5), rank**-0.5)
        layer.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    return layer
