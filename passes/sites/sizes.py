"""What a merged token stands for, in attention and in means behind the merge.

A token of size n is n equal tokens: attention adds log n to its key's logits, a weighted mean counts it n times.
`RetargetTokens` notes the sizes on each op, `ApplySizes` writes them out once all sites are in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.attention.attention_kernel import ALIGN
from passes.axes.gather import along
from passes.graph.base import ALIVE, Check, CompileError, Pass, PassResult, Refusal
from passes.graph.codes import Code
from passes.graph.facts import Fact
from passes.graph.layout import Batch, Layout, Piece, Prunable, Tokens
from passes.graph.ops import SDPA, arguments
from passes.graph.splice import replace_by, splice

KEY_SIZES: Fact[Node] = Fact("sizes of keys")  # of nodes: [B, Nk]
# of nodes: [B, N], dimension of samples (None for one sample), dimension of tokens
# of nodes: [B, N], dimension of samples (None for one sample), dimension of tokens
MEAN_SIZES: Fact[tuple[Node, int | None, int]] = Fact("sizes in a mean")
HOW: Fact[str] = Fact("size bias")  # of graphs: "mask", "channel" or "mask and channel"


def stretch_sizes(sizes: Tensor, site: Tokens, pieces: Sequence[Piece]) -> Tensor:
    """The sizes along another sequence made of the same prunable stretch; other tokens stand for themselves.

    Args:
        sizes: [B, K] along the pruned sequence.
        site: that sequence.
        pieces: the other one.
    """
    first = next(i for i, p in enumerate(site.pieces) if isinstance(p, Prunable))
    before = sum(p.length for p in site.pieces[:first])
    after = sum(p.length for p in site.pieces[first + 1 :])
    stretch = sizes[:, before : sizes.shape[1] - after]
    parts = [stretch if isinstance(p, Prunable) else sizes.new_ones(sizes.shape[0], p.length) for p in pieces]
    return torch.cat(parts, 1)


def log_bias(sizes: Tensor) -> Tensor:
    """[B, Nk] -> [B, 1, 1, Nk]."""
    return sizes.log()[:, None, None, :]


def with_bias(logits: Tensor, sizes: Tensor) -> Tensor:
    """Logits [B, H, Nq, Nk] of keys that stand for `sizes` [B, Nk] tokens each."""
    return logits + log_bias(sizes).to(logits.dtype)


def attend_by_mask(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sizes: Tensor, scale: float | None, gqa: bool
) -> Tensor:
    """Attention [B, H, N, d] with size bias as an additive mask: in float32 or wider on CPU."""
    bias = log_bias(sizes).to(
        torch.promote_types(query.dtype, torch.float32) if query.device.type == "cpu" else query.dtype
    )
    if mask is not None:
        bias = torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else mask + bias
    return F.scaled_dot_product_attention(query, key, value, bias, scale=scale, enable_gqa=gqa)


def attend_by_channel(
    query: Tensor, key: Tensor, value: Tensor, sizes: Tensor, scale: float | None, gqa: bool
) -> Tensor:
    """The same without a mask, which would keep the flash kernel off.

    A channel that is 1 in the queries and log(n) / scale in the keys adds log(n) to the logits; two of them carry its
    high and its low part, for half precision. Zeros pad a head to a multiple of 8 channels.
    """
    width = query.shape[-1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    added = torch.arange(2 + -(width + 2) % ALIGN, device=query.device)
    bias = (sizes.log() / scale)[:, None, :, None]
    high = bias.bfloat16().float()  # whatever the dtype here: autocast may round to bfloat16 later
    bias = torch.where(added == 0, high, torch.where(added == 1, bias - high, 0))
    query = _widened(query, added < 2)
    key = _widened(key, bias)
    value = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    if query.shape == key.shape:
        # one kernel writes all three; Inductor makes three of `stack`
        query, key, value = torch.cat([query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)])
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=gqa)[..., :width]


def _widened(x: Tensor, channels: Tensor) -> Tensor:
    return torch.cat([x, channels.to(x.dtype).expand(*x.shape[:-1], channels.shape[-1])], -1)


def weighed(x: Tensor, sizes: Tensor, samples: int | None, tokens: int) -> Tensor:
    """x times size over mean size, so that its mean over tokens is the weighted mean."""
    return x * along((sizes / sizes.mean(1, keepdim=True)).to(x.dtype), x.dim(), samples, tokens)


def no_noted_size(gm: GraphModule) -> None:
    """No mean waits for its sizes, and nothing that is not read is kept alive."""
    if any(MEAN_SIZES.known(node) or ALIVE.known(node) for node in gm.graph.nodes):
        raise CompileError("sizes of merged tokens are noted and not written", code=Code.FAULT)


@dataclass(frozen=True)
class ApplySizes(Pass):
    """Writes the noted sizes into attentions and means.

    CPU's flash kernel takes a mask as it is, so there the bias is a mask; elsewhere a mask would force the flash kernel
    off, so it is a channel, unless a mask is there anyway.
    """

    ensures: ClassVar[tuple[Check, ...]] = (no_noted_size,)

    def call(self, gm: GraphModule) -> PassResult:
        how: set[str] = set()
        for node in list(gm.graph.nodes):
            if KEY_SIZES.known(node) and node.target is SDPA:
                how.add(_bias(gm, node))
            elif MEAN_SIZES.known(node):
                sizes, samples, tokens = MEAN_SIZES.take(node)
                with gm.graph.inserting_before(node):
                    by_size = partial(weighed, samples=samples, tokens=tokens)
                    x = splice(gm.graph, "sizes", by_size, node.args[0], sizes)
                node.args = (x, *node.args[1:])
        for node in gm.graph.nodes:
            ALIVE.forget(node)
        HOW.put(gm, " and ".join(sorted(how)))
        return PassResult(gm, rewrites=len(how))


def _bias(gm: GraphModule, node: Node) -> str:
    given: dict[str, Any] = arguments(node)
    sizes = KEY_SIZES.of(node)
    query, key, value, mask = (given[k] for k in ("query", "key", "value", "attn_mask"))
    scale, gqa = given["scale"], given["enable_gqa"]
    val = query.meta["val"]
    same = val.shape[-1] == value.meta["val"].shape[-1]
    channel = val.device.type not in ("cpu", "meta") and mask is None and same

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None, n: Tensor) -> Tensor:
        if channel:
            return attend_by_channel(q, k, v, n, scale, gqa)
        return attend_by_mask(q, k, v, m, n, scale, gqa)

    replace_by(gm, node, "sizes", attend, query, key, value, mask, sizes)
    return "channel" if channel else "mask"


def check_biasable(node: Node, pairs: Layout, one_sample: bool) -> None:
    """Refuses an attention that cannot take a bias per key.

    Args:
        node: the attention op.
        pairs: the layout of its result.
        one_sample: the stream has no dimension for samples.
    """
    given: dict[str, Any] = arguments(node)
    way_out = "use Schedule(by=Stream(size_bias=False)), or prune instead of merging"
    if given["is_causal"]:
        raise Refusal(
            "causal attention, in which a merged token would stand at two places", node, way_out, code=Code.SIZES
        )
    if given["dropout_p"]:
        raise Refusal(
            "attention with dropout does not take a size bias", node, "call model.eval() first", code=Code.TRAIN_MODE
        )
    alone = len(pairs) == 4 and (isinstance(pairs[0][0], Batch) if len(pairs[0]) == 1 else one_sample and not pairs[0])
    if not alone:
        raise Refusal("this attention is not on [batch, heads, tokens, channels]", node, way_out, code=Code.SIZES)
