"""Terms of a residual sum that share their work are one branch: a low-rank adapter beside the layer it adapts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import graph_of, recorded
from torch import Tensor, nn

from passes.network.branches import find_blocks, find_branches

WIDTH, HIDDEN = 8, 12


class Adapted(nn.Module):
    """A linear layer, and beside it up to two low-rank ones."""

    def __init__(self, inside: int, outside: int, adapters: int = 1) -> None:
        super().__init__()
        self.base = nn.Linear(inside, outside)
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Linear(inside, 2, bias=False), nn.Linear(2, outside, bias=False)) for _ in range(adapters)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for adapter in self.adapters:
            y = y + adapter(x) * 0.5
        return y


class Block(nn.Module):
    """Attention and an MLP whose every layer is adapted, one after the other or in parallel."""

    def __init__(self, adapters: int = 1, parallel: bool = False, gated: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = Adapted(WIDTH, 3 * WIDTH, adapters), Adapted(WIDTH, WIDTH, adapters)
        self.up, self.down = Adapted(WIDTH, HIDDEN, adapters), Adapted(HIDDEN, WIDTH, adapters)
        self.gate = nn.Linear(WIDTH, HIDDEN)
        self.parallel, self.gated = parallel, gated

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v)[:, 0])

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x) if self.gated else F.relu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            y = self.norm1(x)
            return x + (self.attention(y) + self.mlp(y))
        x = x + self.attention(self.norm1(x))
        return self.mlp(self.norm2(x)) + x


@pytest.mark.parametrize("block", [Block(), Block(adapters=2), Block(gated=True)], ids=["one", "two", "gated"])
def test_a_layer_and_its_adapters_are_one_branch(block: Block) -> None:
    gm = graph_of(nn.Sequential(block))
    attention, mlp = find_branches(gm)
    assert (attention.kind, mlp.kind) == ("attention", "mlp")
    x = torch.randn(3, 6, WIDTH)
    values = recorded(gm, x)
    with torch.no_grad():
        torch.testing.assert_close(values[attention.term], block.attention(block.norm1(x)))
        middle = x + block.attention(block.norm1(x))
        torch.testing.assert_close(values[mlp.term], block.mlp(block.norm2(middle)))
    assert len(find_blocks(gm)) == 1


def test_parallel_branches_with_adapters_stay_two() -> None:
    branches = find_branches(graph_of(nn.Sequential(Block(parallel=True))))
    assert [b.kind for b in branches] == ["attention", "mlp"]
    assert branches[0].add is branches[1].add


class OneInput(nn.Module):
    """Attention and MLP share their first linear layer, as in ViT-22B."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inside = nn.Linear(WIDTH, HIDDEN + 3 * WIDTH)
        self.proj, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden, q, k, v = self.inside(self.norm(x)).split([HIDDEN, WIDTH, WIDTH, WIDTH], -1)
        q, k, v = (t[:, None] for t in (q, k, v))
        attention = self.proj(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + (attention + self.down(F.gelu(hidden)))


def test_a_shared_first_layer_joins_nothing() -> None:
    branches = find_branches(graph_of(nn.Sequential(OneInput())))
    assert [b.kind for b in branches] == ["attention", "mlp"]
    assert len(find_blocks(graph_of(nn.Sequential(OneInput())))) == 1


class HalfSteps(nn.Module):
    """A sum that weighs its stream and its branch by numbers, as Conformers do: 1.5 x + 0.5 f(x)."""

    def __init__(self, stream: float, branch: float) -> None:
        super().__init__()
        self.stream, self.branch = stream, branch
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return self.stream * x + self.branch * self.down(F.silu(self.up(x)))


@pytest.mark.parametrize("weights", [(1.5, 0.5), (1.0, 0.5), (2, 1)])
def test_numbers_may_weigh_stream_and_branch(weights: tuple[float, float]) -> None:
    gm = graph_of(HalfSteps(*weights))
    (branch,) = find_branches(gm)
    assert branch.kind == "mlp" and branch.stream.target is torch.ops.aten.relu.default


def test_a_scaled_value_that_goes_on_as_it_is_is_the_stream() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = HalfSteps(1.0, 1.0)

        def forward(self, x: Tensor) -> Tensor:
            y = x * 1.5
            return y + self.block.down(F.silu(self.block.up(y)))

    (branch,) = find_branches(graph_of(Scaled()))
    assert branch.stream.target is torch.ops.aten.mul.Tensor
