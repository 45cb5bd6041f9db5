"""Sums between two transpositions: taken behind the second where the first is thereby undone, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import graph_of, sample
from torch import Tensor

from passes.cleanup.canonicalise import Canonicalise
from passes.cleanup.transposed_sums import turn_sums

aten = torch.ops.aten
Op = Callable[[Tensor], Tensor]


def swap(x: Tensor) -> Tensor:
    return x.permute(0, 2, 1)


TURNED: dict[str, Op] = {
    "stream behind": lambda x: swap(swap(x).cos() + swap(x)) * 2,
    "stream in front": lambda x: swap(x.transpose(1, 2) + swap(x).cos()).relu(),
    "both": lambda x: swap(swap(x) + swap(x * 2)) * 3,
    "weighed": lambda x: swap(torch.add(swap(x).cos(), swap(x), alpha=2)) * 2,
    "returned": lambda x: swap(swap(x).cos() + swap(x)),
    "written to before": lambda x: swap(swap(y := x * 1) * 2 + (s := swap(y), y.add_(1), s)[2]) * 2,
}
LEFT: dict[str, Op] = {
    "read otherwise": lambda x: swap(s := swap(x).cos() + swap(x)) * s.mean(),
    "nothing undone": lambda x: swap(x.cos() + x) * 2,
    "broadcast": lambda x: swap(swap(x)[:, :1] + swap(x)) * 2,
    "a number": lambda x: swap(swap(x) + 1.0) * 2,
    "another order": lambda x: (swap(x).cos() + swap(x)).permute(1, 2, 0) * 2,
    "another place in memory": lambda x: swap(swap(x).contiguous() + swap(x * 2).contiguous()) * 2,
    "four dimensions": lambda x: (
        (x[:, None].permute(0, 1, 3, 2).cos() + x[:, None].permute(0, 1, 3, 2)).permute(0, 1, 3, 2) * 2
    ),
}


@pytest.mark.parametrize("name", [*TURNED, *LEFT])
def test_values_gradients_and_memory_are_the_models(name: str) -> None:
    op = TURNED.get(name) or LEFT[name]
    gm = graph_of(op)
    assert turn_sums(gm.graph) == (1 if name in TURNED else 0)
    gm.graph.eliminate_dead_code()
    assert turn_sums(gm.graph) == 0
    gm.graph.lint()
    gm.recompile()
    for batch in (1, 2, 5):
        x = sample(batch=batch).requires_grad_()
        got, wanted = gm(x)[0], op(x)
        assert torch.equal(got, wanted) and got.stride() == wanted.stride()
        weights = torch.arange(float(got.numel())).reshape(got.shape)
        gradients = [torch.autograd.grad(out, x, weights)[0] for out in (got, wanted)]
        assert torch.equal(*gradients)


def test_the_terms_meet_as_they_were_before() -> None:
    gm = Canonicalise()(graph_of(TURNED["stream behind"])).gm
    total = next(n for n in gm.graph.nodes if n.target is aten.add.Tensor)
    x = next(n for n in gm.graph.nodes if n.op == "placeholder")
    assert x in total.args and tuple(total.meta["val"].shape[1:]) == (6, 8)
    assert Canonicalise()(gm).rewrites == 0
