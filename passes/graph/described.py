"""Fake tensors told by their metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensor, FakeTensorMode


@dataclass(frozen=True)
class Described:
    """A tensor without the tensor. Offsets in memory are left out: no shape depends on them."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, value: FakeTensor) -> Described:
        return cls(tuple(value.shape), tuple(value.stride()), value.dtype, value.device, value.requires_grad)

    def fresh(self, mode: FakeTensorMode) -> FakeTensor:
        """A fake tensor like this, of its own memory."""
        with torch.no_grad():
            meta = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
            return FakeTensor(mode, meta.requires_grad_(self.requires_grad), self.device)
