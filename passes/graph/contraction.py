"""matmul, bmm, baddbmm and einsum read alike: a product of two tensors with a letter for each dimension."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from torch import SymInt, Tensor
from torch._ops import OpOverload
from torch.fx import Node

from passes.graph.ops import arguments, aten_name

MATMULS = {"matmul": ("self", "other"), "bmm": ("self", "mat2"), "baddbmm": ("batch1", "batch2")}


@dataclass(frozen=True)
class Contraction:
    """left (dims left_dims) times right (right_dims) gives node (dims), letters as einsum writes them."""

    node: Node
    left: Node
    right: Node
    left_dims: str
    right_dims: str
    dims: str

    @classmethod
    def of(cls, node: Node) -> Contraction | None:
        """Reads a node as a product of two tensors of rank 3 or more, None if it is no such thing."""
        name = aten_name(node)
        if name == "einsum":
            given = arguments(node)
            left, *rest = given["tensors"]
            if len(rest) != 1:
                return None
            dims = _einsum_dims(given["equation"], rank(left), rank(rest[0]))
            right = rest[0]
        elif name in MATMULS:
            left, right = (arguments(node)[operand] for operand in MATMULS[name])
            batch = string.ascii_lowercase[: rank(node) - 2]
            dims = tuple(
                batch[len(batch) - (rank(x) - 2) :] + last
                for x, last in ((left, "IK"), (right, "KJ"), (node, "IJ"))
                if rank(x) >= 2
            )
        else:
            return None
        if len(dims) != 3 or min(map(rank, (left, right, node))) < 3:
            return None
        return cls(node, left, right, *dims)


def is_alias(node: Node) -> bool:
    """Whether an op node only shows its first argument under another shape."""
    returns = node.target._schema.returns if isinstance(node.target, OpOverload) else ()
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def rank(node: Node) -> int:
    return int(node.meta["val"].dim())


def order(dims: str, wanted: Sequence[str]) -> list[int | None]:
    """Where each wanted dim stands in `dims`, None where it is missing."""
    return [dims.index(d) if d in dims else None for d in wanted]


def arrange(x: Tensor, places: Sequence[int | None]) -> Tensor:
    """Permutes x to an `order`, with a dimension of 1 where one is missing."""
    present = [place for place in places if place is not None]
    if present != sorted(present):
        x = x.permute(present)
    for dim, place in enumerate(places):
        if place is None:
            x = x.unsqueeze(dim)
    return x


def align(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Expands the batch dims of [*batch, N, D] tensors to each other's, as a matmul does."""

    def one(size: int | SymInt) -> bool:
        return isinstance(size, int) and size == 1  # a symbolic size is no literal 1 and gets no guard

    sizes = zip(*(t.shape[:-2] for t in tensors), strict=True)
    batch = [next((n for n in column if not one(n)), 1) for column in sizes]
    return tuple(
        t.expand(*batch, *t.shape[-2:])
        if any(one(n) and not one(m) for n, m in zip(t.shape, batch, strict=False))
        else t
        for t in tensors
    )


def _einsum_dims(equation: str, left_rank: int, right_rank: int) -> tuple[str, ...]:
    """The letters of left, right and result, ellipses spelled out; () where they are no plain product."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    free = [c for c in string.ascii_letters if c not in equation]
    longest = 0
    spelled = []
    for dims, total in ((left, left_rank), (right, right_rank)):
        if "..." in dims:
            hidden = total - len(dims.replace("...", ""))
            longest = max(longest, hidden)
            dims = dims.replace("...", "".join(free[26 - hidden : 26]))
        spelled.append(dims)
    left, right = spelled
    if not arrow:
        out = ("..." if longest else "") + "".join(
            sorted(c for c in set(inputs) if inputs.count(c) == 1 and c.isalpha())
        )
    out = out.replace("...", "".join(free[26 - longest : 26]))
    plain = all(len(set(dims)) == len(dims) for dims in (left, right, out))
    return (left, right, out) if plain else ()
