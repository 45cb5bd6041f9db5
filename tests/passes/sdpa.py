"""One scaled_dot_product_attention as a graph: for the tests of passes that rewrite it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.attention.attention_kernel import AUTOCAST
from passes.capture.capture import capture


class Attend(nn.Module):
    """SDPA of the inputs with fixed options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, *tensors: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*tensors, **self.options)


def graph(*tensors: Tensor, **options: Any) -> GraphModule:
    """Captured, to run without autocast."""
    gm = capture(Attend(**options), tensors, {})
    AUTOCAST.put(gm, {})
    return gm
