"""What the coverage table is made of: one representative of an architecture family, with random weights, small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Subject:
    """One model to try.

    Args:
        library: "timm", "transformers", "torchvision" or "open_clip".
        family: what it stands for, "vit_relpos".
        name: the model, as its library calls it.
        build: makes it, in eval mode; weights are drawn afterwards by the caller.
        inputs: makes its inputs for a number of samples: keyword arguments, or one tensor [B, ...].
    """

    library: str
    family: str
    name: str
    build: Callable[[], nn.Module] = field(repr=False)
    inputs: Callable[[int], Tensor | Mapping[str, Any]] = field(repr=False)
