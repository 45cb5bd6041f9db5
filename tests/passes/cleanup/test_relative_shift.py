"""Transformer-XL's relative shift as a pick out of each query's own row: bit for bit, and short with its queries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import B, N, graph_of, on_short_input, rows, sample, table
from torch import Tensor

from passes.cleanup.relative_shift import WriteRelativeShifts

aten = torch.ops.aten
R = 2 * N
TABLE = table(2, 8, R)
Op = Callable[[Tensor], Tensor]


def skewed(x: Tensor) -> Tensor:
    """[..., N, 2 N] to [..., N, N]."""
    y = x.reshape(*x.shape[:-2], x.shape[-1], x.shape[-2])[..., 1:, :]
    y = y.reshape(*x.shape[:-1], x.shape[-1] - 1)
    return y[..., :N]


def funnel(x: Tensor, shift: int = 1) -> Tensor:
    y = torch.reshape(x, [x.shape[0], x.shape[1], x.shape[3], x.shape[2]])[:, :, shift:, :]
    return torch.reshape(y, [x.shape[0], x.shape[1], x.shape[2], x.shape[3] - shift])[..., :N]


def conformer(x: Tensor) -> Tensor:
    """[..., N, 2 N - 1] with a column of zeros in front."""
    y = torch.cat([x.new_zeros(*x.shape[:-1], 1), x], -1)
    return y.view(*x.shape[:-2], x.shape[-1] + 1, x.shape[-2])[..., 1:, :].view_as(x)[..., :N]


def scores(x: Tensor, width: int = R) -> Tensor:
    """[B, 2, N, 2 N], of queries x [B, N, 8]."""
    return x[:, None] @ TABLE[..., :width]


SHIFTS: dict[str, Op] = {
    "three dimensions": lambda x: skewed(x @ TABLE[0]) * 2,
    "four dimensions": lambda x: skewed(scores(x)) * 2,
    "by slices": lambda x: funnel(scores(x)) * 2,
    "written to": lambda x: funnel(scores(x)).mul_(3) + 1,
}
OTHERS: dict[str, Op] = {
    "read in front and written to": lambda x: (s := scores(x), funnel(s).mul_(3) + s.mean())[1],
    "a written view that is read": lambda x: (s := scores(x).view(B, 2, N, R), s.mul_(2), skewed(s) * s.sum())[2],
    "across rows": lambda x: scores(x).reshape(-1, 2, R, N)[:, :, 1:].reshape(-1, 2, N, R - 1)[..., :R] * 2,
    "heads among rows": lambda x: scores(x).reshape(-1, N, 2, R)[:, :, 1:].reshape(-1, 1, N, R)[..., :N] * 2,
    "returned": lambda x: funnel(scores(x)),
    "plain": lambda x: scores(x)[..., :N] * 2,
}


@pytest.mark.parametrize("name", [*SHIFTS, *OTHERS])
def test_the_same_bit_for_bit(name: str) -> None:
    op = SHIFTS.get(name) or OTHERS[name]
    x = sample()
    gm = graph_of(op)
    count = WriteRelativeShifts()(gm).rewrites
    assert count == (name in SHIFTS) or name == "a written view that is read"
    assert WriteRelativeShifts()(gm).rewrites == 0
    assert bool(gm.graph.find_nodes(op="call_function", target=aten.gather.default)) == bool(count)
    assert torch.equal(gm(x)[0], op(x))
    if "written" not in name and name in SHIFTS:
        assert torch.equal(gm(sample(batch=5))[0], op(sample(batch=5)))
        ours, theirs = (
            torch.autograd.grad(f(y := sample().requires_grad_()), y, gm(x)[0]) for f in (lambda y: gm(y)[0], op)
        )
        torch.testing.assert_close(ours, theirs)


def test_a_view_of_a_view_keeps_its_columns() -> None:
    gm = graph_of(lambda x: conformer(scores(x, R - 1)) * 2)
    assert WriteRelativeShifts()(gm).rewrites == 0  # by another tensor's sizes, which only the clean-up spells out


@pytest.mark.parametrize("op", [skewed, funnel])
@torch.no_grad()
def test_each_query_keeps_its_row_and_each_key_its_column(op: Op) -> None:
    def attention(x: Tensor) -> Tensor:
        return (op(scores(x)) + (x @ x.mT)[:, None]).softmax(-1) @ x[:, None]

    gm = graph_of(attention)
    assert WriteRelativeShifts()(gm).rewrites == 1
    (got,), index = on_short_input(gm, sample())
    x = sample()
    for b in range(B):
        at = index[b]
        logits = op(scores(x))[b][:, at][:, :, at] + x[b, at] @ x[b, at].mT
        torch.testing.assert_close(got[b], logits.softmax(-1) @ x[b, at])
    assert got.shape == (B, 2, 4, 8) and not torch.equal(got, rows(attention(x), index, tokens=2))
