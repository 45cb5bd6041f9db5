"""Which kernel a scaled_dot_product_attention runs on: read off its lowering, never assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from functorch import make_fx
from torch import SymInt, Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node

from passes.graph.contraction import is_alias
from passes.graph.facts import Fact
from passes.graph.fake import Described
from passes.graph.ops import SDPA, arguments

ATEN = torch.ops.aten
FLASH = ATEN._scaled_dot_product_flash_attention.default  # CUDA's
ALIGN = 8  # channels of a head that CUDA's flash kernels take at once
HALF = (torch.float16, torch.bfloat16)
# of graphs: the autocast that the graph will run under, dtype by device type
AUTOCAST: Fact[Mapping[str, torch.dtype]] = Fact("autocast")
_THREE = ("query", "key", "value")
LOWERED = {
    ATEN._scaled_dot_product_flash_attention_for_cpu.default: "flash",
    FLASH: "flash",
    ATEN._scaled_dot_product_efficient_attention.default: "efficient",
    ATEN._scaled_dot_product_cudnn_attention.default: "cudnn",
    ATEN._scaled_dot_product_fused_attention_overrideable.default: "fused",
}


@dataclass(frozen=True)
class KernelChoice:
    """The kernel (flash, efficient, cudnn, fused, math) and, where it is not flash, why."""

    name: str
    reason: str


def kernel_for(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    needs_grad: bool = False,
    enable_gqa: bool = False,
) -> KernelChoice:
    """The kernel that this attention runs on. Only metadata is read: fake tensors do.

    Where torch has the device at hand (always, for CPU) the attention is lowered and the kernel read
    off the result; for a CUDA device that is not here torch's published conditions are applied.

    Args:
        query: [B, H, Nq, D]; key: [B, H, Nk, D]; value: [B, H, Nk, Dv].
        attn_mask: broadcasts to [B, H, Nq, Nk]; whether it requires a gradient matters on CPU.
        needs_grad: gradients flow into query, key and value.

    Raises:
        RuntimeError: from torch, where the shapes make no attention.
    """
    # a fresh mode: a guard on the captured graph's own batch symbol would specialise it
    mode = FakeTensorMode()
    query, key, value = (concrete(t, mode).requires_grad_(needs_grad) for t in (query, key, value))
    mask = None if attn_mask is None else concrete(attn_mask, mode)
    obstacle = _flash_obstacle(query, key, value, mask, dropout_p, is_causal, enable_gqa)
    device = query.device.type
    if device == "cpu" or (device == "cuda" and torch.cuda.is_available()):
        name, op = lowered_kernel(
            query, key, value, mask, dropout_p, is_causal, needs_grad=needs_grad, enable_gqa=enable_gqa
        )
        if name == "flash":
            return KernelChoice(name, f"lowers to {op}")
        return KernelChoice(name, obstacle or "flash is switched off or not in this build of torch")
    name = predicted_kernel(query, key, value, mask, dropout_p, is_causal, enable_gqa=enable_gqa)
    return KernelChoice(name, obstacle or f"expected on {device}; no such device here to lower for")


def predicted_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    enable_gqa: bool = False,
) -> str:
    """The kernel by torch's published conditions (sdp_utils), without lowering anything."""
    if not _flash_obstacle(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        return "flash"
    if query.device.type == "cuda" and _efficient(query, key, value):
        return "efficient"
    return "math"


def lowered_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    needs_grad: bool = False,
    enable_gqa: bool = False,
) -> tuple[str, str]:
    """Lowers one attention to ATen, as Inductor's front end does, and reads off (kernel, op).

    Takes the arguments of `kernel_for`; nothing is computed, about 10 ms.
    """

    mode = FakeTensorMode()
    given = [concrete(t, mode).requires_grad_(needs_grad) for t in (query, key, value)]
    if attn_mask is not None:
        given.append(concrete(attn_mask, mode))

    def attend(q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
        mask = masks[0] if masks else None
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, enable_gqa=enable_gqa)

    autocast = torch.autocast(query.device.type, enabled=False)
    with mode, autocast, torch.set_grad_enabled(needs_grad):
        lowered = make_fx(attend)(*given)
    for node in lowered.graph.nodes:
        if node.target in LOWERED:
            return LOWERED[node.target], str(node.target)
    return "math", "no fused kernel"


def kernels(gm: GraphModule, *, needs_grad: bool = False) -> list[tuple[Node, KernelChoice]]:
    """The kernel of every attention in a captured graph, in graph order.

    Args:
        gm: a captured graph, fake values in meta["val"].
        needs_grad: the graph will be trained through.
    """
    found = []
    known: dict[Any, KernelChoice] = {}  # a network has few kinds of attention
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is FLASH:
            found.append((node, KernelChoice("flash", f"named in the graph: {FLASH}")))
        elif node.op == "call_function" and node.target is SDPA:
            found.append((node, _choice(gm, node, needs_grad, known)))
    return found


def flash_obstacle(gm: GraphModule, node: Node) -> str:
    """What keeps an attention from being CUDA's flash op by name, forward and backward; '' if nothing does.

    Args:
        gm: a captured graph, fake values in meta["val"].
        node: a scaled_dot_product_attention in it.
    """
    given, mode = arguments(node), FakeTensorMode()
    query, key, value = (concrete(given[name].meta["val"], mode) for name in _THREE)
    device = query.device.type
    if device != "cuda":
        return f"{device} has no such op"
    if device in (AUTOCAST.get(gm) or {}):
        return "autocast is on, which casts the inputs of scaled_dot_product_attention and of no kernel's own op"
    mask = None if given["attn_mask"] is None else concrete(given["attn_mask"].meta["val"], mode)
    query, key, value = (t.detach().requires_grad_() for t in (query, key, value))
    return _flash_obstacle(query, key, value, mask, given["dropout_p"], given["is_causal"], given["enable_gqa"])


def _choice(gm: GraphModule, node: Node, needs_grad: bool, known: dict[Any, KernelChoice]) -> KernelChoice:
    """The kernel of an attention that chooses it when it runs, noted in `known` for others like it."""
    given, mode = arguments(node), FakeTensorMode()
    mask = given["attn_mask"]
    if mask is not None:
        val = concrete(mask.meta["val"], mode).detach()
        mask = val.requires_grad_(val.is_floating_point() and _wants_grad(mask, needs_grad))
    query, key, value = (concrete(given[name].meta["val"], mode).detach() for name in _THREE)
    cast = (AUTOCAST.get(gm) or {}).get(query.device.type)
    query, key, value, mask = (_cast(t, cast) for t in (query, key, value, mask))
    plain = (given["dropout_p"], given["is_causal"], needs_grad, given["enable_gqa"])
    kind = (*(None if t is None else Described.of(t) for t in (query, key, value, mask)), *plain)
    if kind not in known:
        known[kind] = kernel_for(
            query,
            key,
            value,
            mask,
            given["dropout_p"],
            given["is_causal"],
            needs_grad=needs_grad,
            enable_gqa=given["enable_gqa"],
        )
    return known[kind]


def _cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Any:
    """What autocast to `dtype` hands on, None for no autocast."""
    if tensor is None or dtype is None or tensor.dtype not in (torch.float32, *HALF):
        return tensor
    return tensor.to(dtype)


def concrete(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor of the same metadata in a mode of its own, symbolic sizes replaced by example values."""

    def number(size: int | SymInt) -> int:
        if not isinstance(size, SymInt):
            return size
        return size.node.hint if isinstance(size.node.hint, int) else 2

    shape, stride = [number(s) for s in tensor.shape], [number(s) for s in tensor.stride()]
    with mode:
        fake = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
        return fake.requires_grad_(tensor.requires_grad)


def _wants_grad(node: Node, training: bool) -> bool:
    """Whether a value requires a gradient at run time; without training only a parameter's own views do."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        if at.op == "get_attr":
            val = at.meta.get("val")
            if isinstance(val, Tensor) and val.requires_grad:
                return True
        elif training or is_alias(at):
            stack.extend(n for n in at.all_input_nodes if _is_float(n))
    return False


def _is_float(node: Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.is_floating_point()


def _flash_obstacle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> str:
    """The first thing that keeps the flash kernel off, '' if nothing does."""
    device, dtype = query.device.type, query.dtype
    if device not in ("cpu", "cuda"):
        return f"torch has no flash kernel on {device}"
    if (obstacle := _shape_obstacle(query, key, value, enable_gqa)) is not None:
        return obstacle
    if value.shape[-1] != query.shape[-1]:
        return f"values have {value.shape[-1]} channels a head, queries {query.shape[-1]}"
    if device == "cpu":
        if dropout_p > 0:
            return "dropout is on, which the CPU kernel does not have"
        if attn_mask is not None and attn_mask.requires_grad:
            return "the mask requires a gradient"
        if attn_mask is not None and attn_mask.dim() not in (2, query.dim()):
            return f"the mask has rank {attn_mask.dim()}, not 2 or {query.dim()}"
        return ""
    if dtype not in HALF:
        return f"{dtype} queries; flash takes float16 and bfloat16"
    if attn_mask is not None:
        return "an explicit mask"
    if query.shape[-1] > 256:
        return f"{query.shape[-1]} channels a head, more than 256"
    if is_causal and query.shape[-2] != key.shape[-2]:
        return f"causal, with {query.shape[-2]} queries and {key.shape[-2]} keys"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "flash is switched off"
    if torch.cuda.is_available():
        given = torch.backends.cuda.SDPAParams(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        if not torch.backends.cuda.can_use_flash_attention(given):
            return "torch has no flash kernel for it on this GPU"
    return ""


def _shape_obstacle(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> str | None:
    """What no fused kernel takes, on any device."""
    three = (query, key, value)
    ranks = {t.dim() for t in three}
    # torch adds the missing dimension itself on CPU
    if ranks != {4} and not (ranks == {3} and query.device.type == "cpu"):
        return f"rank {query.dim()}, not 4"
    if len({t.shape[0] for t in three}) > 1:
        return "query, key and value differ in batch size"
    # the CPU kernel lets groups of query heads share a key head whether or not the caller says so
    heads = {t.shape[1] for t in three} if ranks == {4} else set()
    if len(heads) > 1 and not enable_gqa and query.device.type != "cpu":
        return "query, key and value differ in the number of heads"
    if any(t.stride(-1) != 1 for t in three if t.shape[-1] > 1):
        return "channels are not contiguous in memory"
    if query.shape[-2] == 0 or key.shape[-2] == 0:
        return "no tokens"
    return None


def _efficient(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether CUDA's memory-efficient kernel takes it; it aligns a head's channels to 16 bytes."""
    if _shape_obstacle(query, key, value, enable_gqa=False) is not None:
        return False
    if query.dtype not in (*HALF, torch.float32):
        return False
    channels = 16 // query.element_size()
    return query.shape[-1] % channels == 0 and value.shape[-1] % channels == 0
