"""A model for the export tests, and a file run by each runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm attention and MLP on [B, N, 16], two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.bias: nn.Parameter | None = None  # [2, N, N] of each head
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, self.bias).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Encoder(nn.Module):
    """Three blocks over a class token and 16 patches of [B, 3, 32, 32]; a dict of logits and of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, pixels: Tensor) -> Any:
        x = torch.cat([self.token.expand(pixels.shape[0], -1, -1), self.patches(pixels).flatten(2).mT], 1)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x[:, 0]), "tokens": (x,)}


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


def images(batch: int) -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))[:batch]


def run_onnx(path: Path, x: Tensor) -> dict[str, Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [out.name for out in session.get_outputs()]
    results = session.run(names, {session.get_inputs()[0].name: x.numpy()})
    return {name: torch.from_numpy(result) for name, result in zip(names, results, strict=True)}


def run_openvino(path: Path, x: Tensor) -> dict[str, Tensor]:
    import openvino

    model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {out.any_name: torch.from_numpy(result) for out, result in model(x.numpy()).items()}


def run_executorch(path: Path, x: Tensor) -> list[Tensor]:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(str(path)).load_method("forward")
    assert method is not None
    return list(method.execute([x]))


def far(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max())
