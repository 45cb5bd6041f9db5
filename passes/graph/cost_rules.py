"""What each op costs: a table from the op to a function of its sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Count:
    """What one node, or a sum of nodes, costs for one sample.

    Args:
        macs: multiply-accumulates.
        other: FLOPs that are none, of norms and pooling.
    """

    macs: int = 0
    other: int = 0

    @property
    def flops(self) -> int:
        """FLOPs in fvcore's convention, where a multiply-accumulate is one."""
        return self.macs + self.other

    def __add__(self, more: Count) -> Count:
        return Count(self.macs + more.macs, self.other + more.other)


CostFn = Callable[..., "int | Count"]


def _linear(out: Shape, x: Shape, *_: Any) -> int:
    return prod(out) * x[-1]


def _product(_out: Shape, a: Shape, b: Shape) -> int:
    """mm [M, K] [K, N], bmm, and vectors: mv [M, K] [K], dot [K] [K]."""
    return prod(a) * (b[-1] if len(b) > 1 else 1)


def _add_product(out: Shape, _bias: Shape, a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return _product(out, a, b)


def _matmul(out: Shape, a: Shape, _b: Shape) -> int:
    return prod(out) * a[-1]


def _tensordot(out: Shape, a: Shape, _b: Shape, dims: Shape, *_: Any) -> int:
    return prod(out) * prod(a[dim] for dim in dims)


def _conv(out: Shape, _x: Shape, weight: Shape, *_: Any) -> int:
    """weight [C_out, C_in / groups, *kernel]: each output reads C_in / groups * kernel inputs."""
    return prod(out) * prod(weight[1:])


def _conv_transpose(_out: Shape, x: Shape, weight: Shape, *_: Any) -> int:
    """weight [C_in, C_out / groups, *kernel]: each input goes to C_out / groups * kernel outputs."""
    return prod(x) * prod(weight[1:])


def _convolution(out: Shape, x: Shape, weight: Shape, *rest: Any) -> int:
    transposed = rest[4]  # after bias, stride, padding, dilation
    return (_conv_transpose if transposed else _conv)(out, x, weight)


def _attention(out: Any, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Q K^T and A V: q [..., N, E], k [..., M, E], v [..., M, Ev], out [..., N, Ev].

    A causal attention counts in full, as fvcore counts it.
    """
    out_shape: Shape = out[0] if isinstance(out[0], tuple) else out  # the kernels also return their logsumexp
    return prod(out_shape[:-1]) * k[-2] * (q[-1] + v[-1])


def _einsum(out: Shape, equation: str, operands: tuple[Shape, ...], *, path: Shape | None = None) -> int:
    """Pairwise products in einsum's own order; an index that only one operand has is summed before.

    A product that sums nothing is a pointwise multiplication, which is free like every other.
    """
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "->" not in equation:
        output = "".join(i for i in set(inputs) - {","} if inputs.count(i) == 1 or i == ".")
    size: dict[str, int] = {}
    sets: list[set[str]] = []
    for term, shape in zip(terms, operands, strict=True):
        indices = _indices(term, len(shape))
        for index, extent in zip(indices, shape, strict=True):
            size[index] = max(size.get(index, 1), extent)
        sets.append(set(indices))
    kept = {index for index in size if index in output or ("." in output and index.startswith("."))}
    macs = 0
    steps = iter(path or ())
    while len(sets) > 1:
        i, j = sorted((next(steps), next(steps))) if path else (0, 1)
        b, a = sets.pop(j), sets.pop(i)
        needed = kept.union(*sets)
        a, b = a & (needed | b), b & (needed | a)
        if (a | b) - needed:
            macs += prod(size[index] for index in a | b)
        # a path counts the operands with the result last; without one they fold from the left
        sets.insert(len(sets) if path else 0, (a | b) & needed)
    return macs


def _indices(term: str, rank: int) -> list[str]:
    """One name a dimension; an ellipsis becomes `.1`, `.2`, ... counted from its right end."""
    before, dots, after = term.partition("...")
    if not dots:
        return list(term)
    covered = rank - len(before) - len(after)
    return [*before, *(f".{i}" for i in range(covered, 0, -1)), *after]


def _norm(weight_at: int) -> CostFn:
    """A norm whose weight is argument `weight_at`: 5 an element, 4 without weight."""

    def norm(_out: Any, x: Shape, *rest: Any, **_: Any) -> Count:
        affine = len(rest) >= weight_at and rest[weight_at - 1] is not None
        return Count(other=prod(x) * (5 if affine else 4))

    return norm


def _batch_norm(_out: Any, x: Shape, weight: Shape | None, *rest: Any, **_: Any) -> Count:
    """2 an element from running statistics (a scale and a shift), 1 without weight; else like any norm."""
    if any(item is True for item in rest[1:4]):  # training stands after the running statistics, if any
        return Count(other=prod(x) * (5 if weight is not None else 4))
    return Count(other=prod(x) * (2 if weight is not None else 1))


def _batch_norm_eval(out: Any, x: Shape, weight: Shape | None, *_: Any) -> Count:
    return _batch_norm(out, x, weight)


def _reads(_out: Shape, x: Shape, *_: Any, **__: Any) -> Count:
    return Count(other=prod(x))


def _writes(per_element: int) -> CostFn:
    return lambda out, *_, **__: Count(other=per_element * prod(out))


_BY_RULE: dict[CostFn, str] = {
    _linear: "linear",
    _product: "mm _int_mm bmm mv dot vdot",
    _add_product: "addmm baddbmm addbmm addmv",
    _matmul: "matmul linalg_matmul",
    _tensordot: "tensordot",
    _einsum: "einsum",
    _conv: "conv1d conv2d conv3d",
    _conv_transpose: "conv_transpose1d conv_transpose2d conv_transpose3d",
    _convolution: "convolution _convolution",
    _attention: "scaled_dot_product_attention _scaled_dot_product_flash_attention "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
    "_scaled_dot_product_attention_math_for_mps _scaled_dot_product_fused_attention_overrideable",
    _norm(1): "instance_norm native_group_norm",
    _norm(2): "layer_norm native_layer_norm group_norm",
    _batch_norm: "batch_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm",
    _batch_norm_eval: "_native_batch_norm_legit_no_training",
    _reads: "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d",
    _writes(4): "upsample_bilinear2d grid_sampler grid_sampler_2d",
    _writes(1): "upsample_nearest2d",
}

# the op's name, with or without its overload -> its rule; `passes.graph.cost.register_cost` adds to it
RULES: dict[str, CostFn] = {f"aten.{name}": rule for rule, names in _BY_RULE.items() for name in names.split()}
