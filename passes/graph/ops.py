"""Ops of ATen in sets, and their arguments by the names of their schema: said once, for every pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.graph.layout import expr

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.baddbmm.default}
LINEAR = {aten.linear.default, aten.addmm.default, aten.mm.default, aten._int_mm.default, aten.conv1d.default}
CONV = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
}  # fmt: skip
CONV2D = {aten.conv2d.default, aten.conv2d.padding}
POOL2D = {aten.max_pool2d.default, aten.avg_pool2d.default}
NORMS = {aten.layer_norm.default, aten.rms_norm.default}
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
# regroup the entries of a tensor and keep their order
RESHAPES = VIEWS | {
    aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip
EXPANSIONS = {aten.expand.default, aten.expand_as.default, aten.broadcast_to.default}
CASTS = {aten.to.dtype, aten._to_copy.default}
SUMS = {aten.add.Tensor, aten.sub.Tensor}
SCALES = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}

# act on each entry by itself, and torch does not tag them so
ELEMENTWISE: tuple[Any, ...] = (
    aten.dropout, aten.native_dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout, aten.to,
    aten._to_copy, aten.type_as, aten.clone, aten.contiguous, aten.detach, aten.alias, aten.lift_fresh_copy,
    aten.bernoulli, aten.where, aten.masked_fill, aten.nan_to_num, aten.hardswish, aten.log_sigmoid, aten.subtract,
    aten.rsub, aten.multiply, aten.divide, aten.true_divide, aten.floor_divide, aten.negative, aten.absolute, aten.fix,
    aten.square, aten.greater, aten.greater_equal, aten.less, aten.less_equal, aten.not_equal, aten.isclose,
    aten.__and__, aten.__or__, aten.__xor__, aten.arccos, aten.arccosh, aten.arcsin, aten.arcsinh, aten.arctan,
    aten.arctan2, aten.arctanh, aten.real, aten.imag, aten.isreal, aten._conj, aten.conj, aten.resolve_conj,
    aten.resolve_neg, aten.complex, aten.polar, aten.special_digamma, aten.special_erf, aten.special_erfc,
    aten.special_erfinv, aten.special_exp2, aten.special_expit, aten.special_expm1, aten.special_gammainc,
    aten.special_gammaincc, aten.special_gammaln, aten.special_i0, aten.special_log1p, aten.special_logit,
    aten.special_ndtr, aten.special_psi, aten.special_round, aten.special_sinc, aten.special_xlogy,
)  # fmt: skip
# give values of their own, in the shape of what they read
SHAPED_LIKE: tuple[Any, ...] = (
    aten.rand_like, aten.randn_like, aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like,
)  # fmt: skip
# give what they read, as it is, dropped or rounded
PASS_ON = {
    aten.dropout, aten.native_dropout, aten.feature_dropout, aten.to, aten._to_copy, aten.type_as, aten.clone,
    aten.contiguous, aten.detach, aten.alias, aten.lift_fresh_copy, aten.neg, aten.nan_to_num,
}  # fmt: skip
PERMUTING = (
    aten.permute.default, aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.t.default,
    aten.mT.default, aten.adjoint.default, aten.numpy_T.default, aten.movedim.int, aten.movedim.intlist,
    aten.moveaxis.int, aten.moveaxis.intlist,
)  # fmt: skip

_REQUIRED = object()


@cache
def _formal(op: OpOverload) -> dict[str, tuple[int, Any]]:
    """For each argument of an op its position and its default."""
    return {
        a.name: (at, a.default_value if a.has_default_value() else None) for at, a in enumerate(op._schema.arguments)
    }


def argument(node: Node, name: str, default: Any = _REQUIRED) -> Any:
    """An op's argument by its schema name, however it was passed; the schema's default where it was not.

    Args:
        node: a call of an ATen op.
        name: as the schema has it.
        default: for overloads that have no such argument.

    Raises:
        KeyError: the op has no such argument, and no default is given.
    """
    assert isinstance(node.target, OpOverload)
    formal = _formal(node.target)
    if name not in formal:
        if default is _REQUIRED:
            raise KeyError(f"{node.target} has no argument {name!r}")
        return default
    at, missing = formal[name]
    return node.args[at] if at < len(node.args) else node.kwargs.get(name, missing)


def arguments(node: Node) -> dict[str, Any]:
    """All of an op's arguments by their schema names, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    return {name: argument(node, name) for name in _formal(node.target)}


def view_sizes(node: Node) -> list[Any]:
    """The sizes that a view, a reshape or an unflatten is given."""
    assert isinstance(node.target, OpOverload)
    given: list[Any] = argument(node, next(n for n in ("size", "shape", "sizes") if n in _formal(node.target)))
    return given


def aten_name(node: Node) -> str:
    """`add` for aten.add.Tensor and aten.add_.Tensor, '' for what is no aten op."""
    if not isinstance(node.target, OpOverload) or node.target.namespace != "aten":
        return ""
    return node.target._schema.name.removeprefix("aten::").rstrip("_")


def checked_operator(op: Any) -> Any:
    """What nodes of graphs have as their target where `op` was called: of a `torch.library.custom_op` its op.

    Raises:
        TypeError: it is no op of `torch.ops`.
    """
    target = getattr(op, "_opoverload", op)
    if not isinstance(target, OpOverload | OpOverloadPacket | HigherOrderOperator):
        raise TypeError(f"{op!r} is no op; pass torch.ops.<namespace>.<name> or what torch.library.custom_op returned")
    return target


def shape_of(node: Any) -> tuple[Any, ...]:
    """The shape of a tensor node; an op's argument, which fx leaves untyped, may be given."""
    return tuple(node.meta["val"].shape)


def sizes_of(node: Node) -> tuple[Any, ...] | None:
    """A tensor value's sizes as expressions, to be compared: comparing symbols of torch's would fix the batch.

    None for what is no tensor.
    """
    val = node.meta.get("val")
    return tuple(map(expr, val.shape)) if isinstance(val, torch.Tensor) else None


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def wrap(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def elementwise(target: Any) -> bool:
    """Whether an op computes each entry of its result from the same entries of its inputs, and writes into none."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.pointwise in target.tags or target.overloadpacket in ELEMENTWISE


def permuted(node: Node) -> list[int] | None:
    """For each dimension of the result of a permuting op, the one it was; None for other ops."""
    if node.target not in PERMUTING:
        return None
    rank = len(shape_of(node))
    order = list(range(rank))
    name = str(node.target).split(".")[1]
    if name in ("permute", "movedim", "moveaxis"):
        if name == "permute":
            return [wrap(d, rank) for d in argument(node, "dims")]
        source, to = ([a] if isinstance(a, int) else a for a in (argument(node, n) for n in ("source", "destination")))
        moved = dict(zip((wrap(d, rank) for d in to), (wrap(d, rank) for d in source), strict=True))
        rest = iter(d for d in order if d not in moved.values())
        return [moved[d] if d in moved else next(rest) for d in range(rank)]
    a, b = (argument(node, f"dim{i}", argument(node, f"axis{i}", i - 2)) for i in (0, 1))  # mT: the last two
    if name == "numpy_T":
        return order[::-1]
    if rank < 2:
        return order
    a, b = wrap(a, rank), wrap(b, rank)
    order[a], order[b] = order[b], order[a]
    return order
