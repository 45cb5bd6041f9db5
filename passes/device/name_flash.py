"""CUDA's flash attention by name, where `scaled_dot_product_attention` (SDPA) would choose only when it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.attention.attention_kernel import ALIGN, FLASH, flash_obstacle
from passes.graph.base import Pass, PassResult, Skip
from passes.graph.ops import SDPA, arguments
from passes.graph.splice import replace_by

_WAY_OUT = "results are right as they are; where the model can do without what stands in the way, leave it out"


@dataclass(frozen=True)
class NameFlash(Pass):
    """SDPA on CUDA becomes `aten._scaled_dot_product_flash_attention` where forward and backward of that exist.

    SDPA's own choice depends on the GPU and on flags at run time. It stays elsewhere: with a mask the efficient kernel
    is its own choice, on CPU the flash kernel is, and autocast casts SDPA's inputs but no named op's.

    A head whose channels are not a multiple of 8 is padded with zeros, the scale kept. No other fused kernel takes
    such a head in half precision, so this always pays.
    """

    def call(self, gm: GraphModule) -> PassResult:
        rewrites, skips = 0, []
        for op in list(gm.graph.find_nodes(op="call_function", target=SDPA)):
            if op.meta["val"].device.type != "cuda":
                continue
            if reason := flash_obstacle(gm, op):
                skips.append(Skip.at(op, f"attention keeps its choice of kernel: {reason}", _WAY_OUT))
                continue
            _name(gm, op)
            rewrites += 1
        return PassResult(gm, rewrites, tuple(skips))


def _name(gm: GraphModule, op: Node) -> None:
    given: dict[str, Any] = arguments(op)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        width = query.shape[-1]
        scale = 1 / math.sqrt(width) if given["scale"] is None else given["scale"]
        if pad := -width % ALIGN:
            query, key, value = (F.pad(t, (0, pad)) for t in (query, key, value))
        out: Tensor = FLASH(query, key, value, given["dropout_p"], given["is_causal"], scale=scale)[0]
        return out[..., :width] if pad else out

    replace_by(gm, op, "flash", attend, given["query"], given["key"], given["value"])
