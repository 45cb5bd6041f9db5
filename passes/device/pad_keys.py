"""Keys filled up to the length that a CPU's matrix units take at once, where what is left would cost more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.attention.attention_kernel import AUTOCAST
from passes.graph.base import Pass, PassResult
from passes.graph.ops import SDPA, arguments
from passes.graph.splice import replace_by

_TILE = 16  # keys that a matrix unit takes at once
_PAYS = 6  # keys of a last tile from which on the copies cost less, measured on an Intel Xeon for 21 to 2352 keys
_FEWEST, _MOST = 64, 384  # queries at least, keys at least and at most: elsewhere there was little or nothing to gain
_UNIT = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}


def with_matrix_units() -> tuple[torch.dtype, ...]:
    """The dtypes that this CPU has matrix units for."""
    asked = getattr(torch.cpu, "get_capabilities", None)  # torch 2.9 has none
    has = asked() if asked is not None else {}
    return tuple(dtype for dtype, unit in _UNIT.items() if has.get(unit))


@dataclass(frozen=True)
class PadKeys(Pass):
    """Attention on a CPU in half precision reads keys and values filled up to a multiple of 16, masked.

    With AMX torch's flash kernel takes twice as long for 158 keys as for 160. A masked key's weight is exactly 0.

    Args:
        dtypes: those to do it for; a CPU without matrix units gains nothing.
    """

    dtypes: tuple[torch.dtype, ...]

    def call(self, gm: GraphModule) -> PassResult:
        rewrites = 0
        for op in list(gm.graph.find_nodes(op="call_function", target=SDPA)):
            if self._pays(gm, op):
                _pad(gm, op)
                rewrites += 1
        return PassResult(gm, rewrites)

    def _pays(self, gm: GraphModule, op: Node) -> bool:
        given = arguments(op)
        key, mask = given["key"].meta["val"], given["attn_mask"]
        cast = (AUTOCAST.get(gm) or {}).get("cpu")
        if key.device.type != "cpu" or (cast or key.dtype) not in self.dtypes or key.dim() != 4:
            return False
        if given["is_causal"] or given["dropout_p"] or (mask is not None and not _by_key(mask.meta["val"], key)):
            return False
        count, queries = key.shape[2], given["query"].meta["val"].shape[2]
        if not isinstance(count, int) or not isinstance(queries, int):
            return False
        return queries >= _FEWEST and _FEWEST <= count <= _MOST and count % _TILE >= _PAYS


def _by_key(mask: Tensor, key: Tensor) -> bool:
    """Whether a mask has one row for all queries, which costs little to fill up."""
    return mask.dim() in (2, 4) and mask.shape[-2] == 1 and mask.shape[-1] == key.shape[2]


def _pad(gm: GraphModule, op: Node) -> None:
    given: dict[str, Any] = arguments(op)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        count = key.shape[2]
        pad = -count % _TILE
        if mask is None:
            at = torch.arange(count + pad, device=key.device)
            # torch reads a mask of another width than float32 or the queries' as if it were theirs
            wide = torch.promote_types(query.dtype, torch.float32)
            mask = torch.where(at < count, 0.0, -math.inf).to(wide)[None, None, None]
        else:
            mask = F.pad(mask, (0, pad), value=False if mask.dtype == torch.bool else -math.inf)
        key, value = (F.pad(t, (0, 0, 0, pad)) for t in (key, value))
        return F.scaled_dot_product_attention(
            query, key, value, mask, scale=given["scale"], enable_gqa=given["enable_gqa"]
        )

    replace_by(gm, op, "pad keys", attend, *(given[name] for name in ("query", "key", "value", "attn_mask")))
