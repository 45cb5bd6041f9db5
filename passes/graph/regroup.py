"""What a view does to a layout: factors regrouped over other dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import sympy
import torch

from passes.graph.layout import (
    Batch,
    Dim,
    Factor,
    Free,
    Layout,
    Line,
    Maps,
    Prunable,
    Tokens,
    expr,
    factor_size,
    merged,
    on_grid,
)


def regroup(layout: Layout, shape: Sequence[int | torch.SymInt]) -> Layout | None:
    """The layout after a view to `shape`, or None where that would split tokens or samples."""
    rest = list(merged(f for dim in layout for f in dim))  # neighbouring free factors regroup at will
    out: list[Dim] = []
    for at, size in enumerate(shape):
        need, dim = expr(size), []
        if need == 1 and rest and _single(rest[0]):
            dim.append(rest.pop(0))
        while need != 1:
            if not rest:
                return None
            factor = rest.pop(0)
            have = factor_size(factor)
            ratio = sympy.cancel(need / have)
            if ratio.is_integer and not sympy.denom(ratio).free_symbols:
                dim.append(factor)
                need = ratio
                continue
            inner = sympy.cancel(have / need)
            if inner.is_integer and _splits(factor):
                rows, columns = on_grid(Tokens(factor.pieces), int(need), int(inner))
                dim += rows
                rest[:0] = columns
                need = sympy.Integer(1)
                continue
            if not isinstance(factor, Free | Maps) or not inner.is_integer:
                return None
            outer = isinstance(factor, Maps) and need.free_symbols
            dim.append(Maps(need, True) if outer else Free(need))
            rest.insert(0, Maps(inner, True) if isinstance(factor, Maps) and not outer else Free(inner))
            need = sympy.Integer(1)
        if dim and rest and isinstance(dim[-1], Line) and isinstance(rest[0], Line) and rest[0].count == 1:
            dim += [rest.pop(0)] if at + 1 == len(shape) or expr(shape[at + 1]) != 1 else []
        out.append(merged(f for f in dim if len(dim) == 1 or not _one_sample(f)))
    return None if rest else tuple(out)


def _single(factor: Factor) -> bool:
    return _one_sample(factor) or (isinstance(factor, Line) and factor.count == 1)


def _one_sample(factor: Factor) -> bool:
    """Whether a factor of samples is a single one, which may be folded into anything."""
    return isinstance(factor, Batch) and bool(factor.size == 1)


def _splits(factor: Factor) -> TypeGuard[Tokens]:
    """Whether tokens may become rows and columns: all of them may go, and they are no attention weights."""
    return type(factor) is Tokens and not factor.weights and all(isinstance(p, Prunable) for p in factor.pieces)
