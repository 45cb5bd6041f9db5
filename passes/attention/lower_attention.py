"""Hand-written attention becomes one scaled_dot_product_attention (SDPA)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.attention.attention_pattern import CASTS, RESHAPES, SAME, TURNS, Attention, Miss, Step, fed_by_product
from passes.attention.constants import Constants
from passes.attention.viewed_biases import view_biases
from passes.graph.base import Pass, PassResult, Skip
from passes.graph.contraction import MATMULS, align, arrange, is_alias
from passes.graph.ops import SDPA, argument, arguments, aten_name
from passes.graph.splice import ORIGIN, splice

# a product of activations is as finite as the logits themselves
_WAY_OUT = "results are right as they are; for a fused kernel call F.scaled_dot_product_attention there in the model"
FINITE = {*MATMULS, "einsum", "mm", "addmm", "linear", "conv1d", "conv2d", "sigmoid", "tanh"}
KEEP_FINITE = {
    *(SAME | CASTS | RESHAPES | TURNS),
    *("add", "sub", "rsub", "mul", "neg", "relu", "gelu", "where", "masked_fill", "expand", "repeat", "pad"),
    *("index", "index_select", "gather", "slice", "select", "cat", "stack", "constant_pad_nd"),
}


@dataclass(frozen=True)
class LowerAttention(Pass):
    """softmax(s Q K^T + mask) V in any usual spelling becomes `scaled_dot_product_attention`.

    Each softmax over keys [..., Nq, Nk] is followed to its product with V and back to Q K^T; what stands
    between may be, in any order, scales, additive masks, boolean fills and changes of the batch dims.
    SDPA gets [B, H, N, D]: a missing head dim is added and taken off again. A softmax fed by a matrix
    product which is not lowered is a `Skip` with the reason.

    Rows whose keys are all masked with -inf: softmax gives NaN there, SDPA 0. Where a mask could have such
    a row (it depends on the input, or is a constant that has one) the NaN is put back, so the output is
    the model's own. A fill with a finite value of -1e4 or less becomes the lowest finite number, which keeps
    the uniform weights of a fully masked row; it relies on logits within +-9000. The gradient of a fully
    masked row is SDPA's: 0 for -inf instead of NaN, and with a finite mask not that of uniform weights.
    A float32 mask over bfloat16 queries is rounded to bfloat16, as SDPA demands. A mask that the model writes
    down as one that hides nothing is dropped, of SDPA that the model calls itself too: CUDA's flash kernel takes none.
    """

    def call(self, gm: GraphModule) -> PassResult:
        rewrites, skips = view_biases(gm), []
        constants = Constants(gm)
        rewrites += _drop_idle_masks(gm, constants)
        for node in list(gm.graph.nodes):
            if aten_name(node) not in ("softmax", "_softmax") or node.meta["val"].dim() < 3:
                continue
            if arguments(node)["dim"] not in (-1, node.meta["val"].dim() - 1):
                continue
            try:
                _lower(Attention(node, constants), constants)
                rewrites += 1
            except Miss as miss:
                if fed_by_product(node):
                    skips.append(Skip.at(node, str(miss), _WAY_OUT))
        if rewrites:
            # SDPA's result is strided otherwise than a matmul's: what a view took may need a copy now
            for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
                node.target = torch.ops.aten.reshape.default
        return PassResult(gm, rewrites, tuple(skips))


def _drop_idle_masks(gm: GraphModule, constants: Constants) -> int:
    """Takes from SDPA the masks that are written down as hiding nothing; returns how many.

    A model may have none where it runs, and make one where it is exported.
    """
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=SDPA):
        mask = argument(node, "attn_mask")
        if not isinstance(mask, Node) or not constants.hides_nothing(mask, mask.meta["val"].dtype == torch.bool):
            continue
        if len(node.args) > 3:
            node.update_arg(3, None)
        else:
            node.update_kwarg("attn_mask", None)
        count += 1
    return count


def _lower(found: Attention, constants: Constants) -> None:
    """Puts SDPA where the product with V stood."""
    old = found.second.node
    graph = old.graph
    attend = _function(found, _restores_nan(found, constants), _copies_mask(found))
    tensors = [s.node for s in found.steps if s.kind != "reshape"]
    with graph.inserting_before(old):
        new = splice(graph, "attention", attend, found.q, found.k, found.v, *tensors)
    at = old.prev
    while ORIGIN.get(at) == "attention" and "stack_trace" not in at.meta:
        at.meta |= {key: old.meta[key] for key in ("stack_trace", "nn_module_stack") if key in old.meta}
        at = at.prev
    old.replace_all_uses_with(new)
    # checks and in-place ops count as side effects: dead-code removal would keep them, and the logits
    for node in [old, *sorted(found.chain, key=constants.position.__getitem__, reverse=True)]:
        for user in list(node.users):
            if aten_name(user) == "_assert_tensor_metadata":
                graph.erase_node(user)
        graph.erase_node(node)


def _function(found: Attention, restores_nan: bool, copies_mask: bool) -> Callable[..., Tensor]:
    """The new arithmetic: a PyTorch function of q, k, v and the tensors of the steps."""
    lowest = torch.finfo(found.dtype).min
    # the one size that is not known stays open
    batches = {s: [n if isinstance(n, int) else -1 for n in s.node.meta["val"].shape[:-2]] for s in found.steps}

    def attend(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        q, k = align(arrange(q, found.q_order), arrange(k, found.k_order))
        tensors = iter(given)
        mask: Tensor | None = None
        for step in found.steps:
            if step.kind == "reshape":
                batch = batches[step]
                if mask is not None:
                    mask = mask.expand(*q.shape[:-2], *mask.shape[-2:]).reshape(*batch, *mask.shape[-2:])
                q, k = (x.reshape(*batch, *x.shape[-2:]) for x in (q, k))
            elif step.kind == "temper":
                tensor = next(tensors)
                q = q * tensor if step.value > 0 else q / tensor
            else:
                mask = _masked(mask, step, _matrix(next(tensors)), found.dtype)
        q, k, v = align(q, k, arrange(v, found.v_order))
        if mask is not None and mask.dtype != found.dtype:
            narrower = found.dtype.itemsize < mask.dtype.itemsize
            finite = mask.clamp(min=lowest) if narrower else mask
            mask = finite.masked_fill(mask == -math.inf, -math.inf).to(found.dtype)
        elif mask is not None and copies_mask:
            mask = mask.clone()
        scale = found.scale
        if scale <= 0:  # CUDA's flash kernel takes the maximum before it scales
            q, scale = q * scale, 1.0
        out = _attend(q, k, v, mask, found.dropout_p, scale)
        if mask is not None and restores_nan:
            out = out.masked_fill(mask.amax(-1, keepdim=True) == -math.inf, math.nan)
        return arrange(out, found.out_order)

    return attend


def _matrix(mask: Tensor) -> Tensor:
    return mask if mask.dim() >= 2 else mask.view(1, -1)


def _masked(mask: Tensor | None, step: Step, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask after one more step; both broadcast to [*batch, Nq, Nk]."""
    if step.kind == "add":
        term = tensor if step.value == 1 else tensor * step.value
        return term if mask is None else mask + term
    hole = tensor if step.kind == "fill" else ~tensor
    value = step.value if math.isinf(step.value) else torch.finfo(dtype).min
    if mask is None:
        return torch.zeros_like(hole, dtype=dtype).masked_fill(hole, value)
    return torch.where(hole, value, mask)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float) -> Tensor:
    """SDPA of [*batch, N, D] tensors, as the [B, H, N, D] with contiguous channels that flash wants."""
    shape = (*q.shape[:-1], v.shape[-1])
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if mask is not None and mask.dim() == 3:
        mask = mask.unsqueeze(1 if len(shape) == 3 else 0)
    if len(shape) == 3:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    elif len(shape) > 4:
        if mask is not None and mask.dim() > 4:
            mask = mask.expand(*shape[:-3], *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)
    if len(shape) == 3:
        return out.squeeze(1)
    return out.reshape(shape) if len(shape) > 4 else out


def _copies_mask(found: Attention) -> bool:
    """Whether the mask is a parameter's own view: CPU flash shuns those even without gradients."""
    masks = [s.node for s in found.steps if s.kind in ("add", "fill", "keep")]
    if len(masks) != 1:
        return False
    node = masks[0]
    while is_alias(node):
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def _restores_nan(found: Attention, constants: Constants) -> bool:
    """Whether some row might be masked with -inf throughout."""
    hazards = [s for s in found.steps if _hides(s, constants)]
    holes = [_hole(s, constants) for s in hazards]
    known = [h for h in holes if h is not None]
    if len(known) < len(holes) or (holes and any(s.kind == "reshape" for s in found.steps)):
        return True
    return bool(known) and bool(reduce(operator.or_, known).all(-1).any())


def _hides(step: Step, constants: Constants) -> bool:
    """Whether a step may put -inf in place of a logit."""
    if step.kind == "add":
        return _may_be_infinite(step.node, constants)
    return step.value == -math.inf and step.kind in ("fill", "keep")


def _hole(step: Step, constants: Constants) -> Tensor | None:
    """Where a step puts -inf, [..., Nq, Nk]; None where that is not known before the input is."""
    value = constants.value(step.node)
    if value is None:
        return None
    value = _matrix(value)
    return value.isinf() if step.kind == "add" else value if step.kind == "fill" else ~value


def _may_be_infinite(node: Node, constants: Constants) -> bool:
    if (value := constants.value(node)) is not None:
        return bool(torch.isinf(value).any())
    val = node.meta.get("val")
    if (isinstance(val, Tensor) and not val.is_floating_point()) or aten_name(node) in FINITE:
        return False
    literals = [a for a in node.args if isinstance(a, float)]
    if aten_name(node) not in KEEP_FINITE or any(map(math.isinf, literals)):
        return True
    return any(_may_be_infinite(n, constants) for n in node.all_input_nodes)
