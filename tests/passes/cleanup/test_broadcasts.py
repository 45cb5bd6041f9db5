"""What is expanded to meet a value of that size meets it as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import C, N, graph_of, sample
from torch import Tensor, nn

import rs_compile
from passes.cleanup.broadcasts import drop_expansions
from passes.cleanup.canonicalise import Canonicalise
from passes.graph.ops import EXPANSIONS

Op = Callable[[Tensor, Tensor], Tensor]
DROPPED: dict[str, Op] = {
    "a gate": lambda x, y: x * y.mean(1, keepdim=True).expand_as(x),
    "first": lambda x, y: y[..., :1].expand_as(x) / (2 + x),
    "new dimensions": lambda x, y: x * y[0, 0].expand(x.shape[0], N, C),
    "a mask": lambda x, y: x.masked_fill((y[..., :1] > 0).expand_as(x), 0.0),
    "one of two": lambda x, y: x * y[:, :1].expand_as(x) * y[..., :1].broadcast_to(x.shape),
}
STAYS: dict[str, Op] = {
    "nothing else has its size": lambda x, y: y[:, :1].expand_as(x).relu() @ x.mT,
    "each gives a size": lambda x, y: y[:, :1].expand(-1, N, -1)[..., :1] * y[:, :1],
    "a stream": lambda x, y: y[0].expand(x.shape[0], -1, -1) + x,
    "another dtype": lambda x, y: x.half() * y[0, 0, 0].expand_as(x),
}


@pytest.mark.parametrize("name", DROPPED)
def test_the_same_values_gradients_and_strides(name: str) -> None:
    f = DROPPED[name]
    gm = Canonicalise()(graph_of(f, sample(), sample(seed=1))).gm
    assert not [n for n in gm.graph.nodes if n.target in EXPANSIONS]
    for batch in (1, 2, 5):
        both = [sample(batch=batch, seed=s).requires_grad_() for s in (0, 1)]
        got, wanted = gm(*both)[0], f(*both)
        assert torch.equal(got, wanted) and got.stride() == wanted.stride()
        for g, w in zip(
            torch.autograd.grad(got.square().sum(), both, allow_unused=True),
            torch.autograd.grad(wanted.square().sum(), both, allow_unused=True),
            strict=True,
        ):
            assert (g is None) == (w is None) and (w is None or torch.allclose(g, w))


@pytest.mark.parametrize("name", STAYS)
def test_what_gives_the_result_its_size_or_dtype_stays(name: str) -> None:
    gm = graph_of(STAYS[name], sample(), sample(seed=1))
    assert drop_expansions(gm.graph) == 0


class Gated(nn.Module):
    """A residual block whose branch is gated as in the squeeze-and-excitation networks' own code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.gate = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        gate = self.gate(y.mean((2, 3))).sigmoid()[:, :, None, None]
        return torch.relu(x + y * gate.expand_as(y))


@torch.no_grad()
def test_a_gate_expanded_to_the_map_follows_a_cut() -> None:
    torch.manual_seed(0)
    first, second = Gated(4), nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), Gated(6))
    model = nn.Sequential(first, second, nn.AdaptiveAvgPool2d(1)).double().eval()
    x = torch.randn(2, 4, 12, 12, dtype=torch.float64)
    schedule = rs_compile.Schedule(grid={0: rs_compile.GridPrune(4, 0)})
    short = rs_compile.optimize(model, schedule, backend="eager")(x)
    stage = first(x)
    rows = (stage - x).square().sum(1).sqrt().mean(2).argsort(1, descending=True)[:, :8].sort(1).values
    cut = torch.stack([sample[:, kept] for sample, kept in zip(stage, rows, strict=True)])
    torch.testing.assert_close(short, second(cut).mean((2, 3), keepdim=True), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(short, model(x))
