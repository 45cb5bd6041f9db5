"""Class tokens and registers that join before a reshape, in whatever order: each stays, wherever the reshape puts it.

x is [B, T, N, 12]: T frames of N patches; the streams are [B * T, n, C], [B, T * n, C] or [B * N, t, C].
"""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rs_compile
from passes.graph.base import Refusal
from rs_compile import Schedule

B, T, N, C = 2, 3, 8, 16
KEEP = {0: 0.6, 1: 0.6}
Join = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attention = nn.MultiheadAttention(C, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(C, 32), nn.GELU(), nn.Linear(32, C))

    def mix(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        found: Tensor = self.attention(z, z, z, need_weights=False)[0]
        return found

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Net(nn.Module):
    """Three layers over what `join(patches [B, T, N, C], a class token [C], two registers [2, C])` makes."""

    def __init__(self, join: Join) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.join, self.patch = join, nn.Linear(12, C)
        self.cls, self.registers = nn.Parameter(torch.randn(C)), nn.Parameter(torch.randn(2, C))
        self.layers = nn.Sequential(Layer(), Layer(), Layer())
        self.eval().double()
        oracle.shake(self, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(self.join(self.patch(x), self.cls, self.registers))
        return out


def front(p: Tensor, c: Tensor) -> Tensor:
    """A class token in front of each frame: [B, T, 1 + N, C]."""
    return torch.cat([c.expand(p.shape[0], p.shape[1], 1, C), p], 2)


def written(p: Tensor, c: Tensor) -> Tensor:
    y = F.pad(p, (0, 0, 1, 0))
    y[:, :, 0] = c
    return y


def moved(p: Tensor, c: Tensor) -> Tensor:
    """Channels first while the token joins, as convolutions leave them."""
    y = torch.cat([c[:, None].expand(p.shape[0], p.shape[1], C, 1), p.permute(0, 1, 3, 2)], 3)
    return y.movedim(-1, 2).flatten(0, 1)


def patch_first(p: Tensor, c: Tensor) -> Tensor:
    """A temporal token for each place: [B * N, 1 + T, C]."""
    y = p.transpose(1, 2)
    return torch.cat([c.expand(p.shape[0], y.shape[1], 1, C), y], 2).reshape(-1, T + 1, C)


def at_the_start(p: Tensor, c: Tensor) -> Tensor:
    y = front(p, c * 0)
    return torch.where((torch.arange(N + 1) == 0)[:, None], c, y).flatten(0, 1)


JOINED: dict[str, tuple[Join, tuple[int, ...]]] = {
    "a frame in the batch": (lambda p, c, r: front(p, c).reshape(-1, N + 1, C), (0,)),
    "by flatten": (lambda p, c, r: front(p, c).flatten(0, 1), (0,)),
    "joint": (lambda p, c, r: front(p, c).reshape(-1, T * (N + 1), C), (0, N + 1, 2 * N + 2)),
    "joint, by flatten": (lambda p, c, r: front(p, c).flatten(1, 2), (0, N + 1, 2 * N + 2)),
    "joint, tokens before frames": (lambda p, c, r: front(p, c).transpose(1, 2).flatten(1, 2), (0, 1, 2)),
    "last": (lambda p, c, r: torch.cat([p, c.expand(p.shape[0], T, 1, C)], 2).flatten(0, 1), (N,)),
    "joint and last": (
        lambda p, c, r: torch.cat([p, c.expand(p.shape[0], T, 1, C)], 2).flatten(1, 2),
        (N, 2 * N + 1, 3 * N + 2),
    ),
    "registers a frame": (
        lambda p, c, r: torch.cat([front(p, c), r.expand(p.shape[0], T, 2, C)], 2).flatten(0, 1),
        (0, N + 1, N + 2),
    ),
    "repeat": (lambda p, c, r: torch.cat([c.repeat(p.shape[0], T, 1, 1), p], 2).view(-1, N + 1, C), (0,)),
    "stack": (
        lambda p, c, r: torch.stack([c.expand(p.shape[0], T, C), *p.unbind(2)], 2).flatten(0, 1),
        (0,),
    ),
    "stacked frames": (
        lambda p, c, r: torch.stack([torch.cat([c.expand(p.shape[0], 1, C), f], 1) for f in p.unbind(1)], 1).flatten(
            1, 2
        ),
        (0, N + 1, 2 * N + 2),
    ),
    "channels first": (lambda p, c, r: moved(p, c), (0,)),
    "temporal tokens": (lambda p, c, r: patch_first(p, c), (0,)),
    "joint under a global token": (
        lambda p, c, r: torch.cat([r[:1].expand(p.shape[0], 1, C), front(p, c).flatten(1, 2)], 1),
        (0, 1, N + 2, 2 * N + 3),
    ),
    "norm, linear and positions between": (
        lambda p, c, r: (F.linear(F.layer_norm(front(p, c), [C]), torch.eye(C).double() + 1) + r[0]).flatten(0, 1),
        (0,),
    ),
    "written into padding": (lambda p, c, r: written(p, c).flatten(0, 1), (0,)),
    "where": (lambda p, c, r: at_the_start(p, c), (0,)),
    "picked in another order": (
        lambda p, c, r: front(p, c)[:, :, torch.tensor([1, 2, 0, *range(3, N + 1)])].flatten(0, 1),
        (2,),
    ),
    "rolled": (lambda p, c, r: front(p, c).roll(3, 2).flatten(0, 1), (3,)),
    "one frame only": (
        lambda p, c, r: torch.cat([torch.cat([r.expand(p.shape[0], 1, 2, C), p[:, :1, 2:]], 2), p[:, 1:]], 1).flatten(
            0, 1
        ),
        (0, 1),
    ),
    "attention without a sum around it": (
        lambda p, c, r: F.scaled_dot_product_attention(*[front(p, c).flatten(0, 1)] * 3),
        (0,),
    ),
}


def by_hand(net: Net, x: Tensor, protected: tuple[int, ...]) -> Tensor:
    """The stream behind the last layer, every token in it: one sequence after another."""
    rows = []
    for stream in net.join(net.patch(x), net.cls, net.registers):
        full, left = stream.clone(), list(range(len(stream)))
        for i, layer in enumerate(net.layers):
            assert isinstance(layer, Layer)
            now = full[left]
            middle = now + layer.mix(now[None])[0]
            branch = layer.mlp(layer.norm2(middle))
            full[left] = middle + branch
            if i in KEEP:
                score = (branch - middle).norm(dim=-1).tolist()
                count = oracle.keep_count(len(left), KEEP[i])
                ranked = sorted(range(len(left)), key=lambda k: (left[k] not in protected, -score[k]))
                left = sorted(left[k] for k in ranked[:count])
        rows.append(full)
    return torch.stack(rows)


def frames() -> Tensor:
    return torch.randn(B, T, N, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("join", "protected"), JOINED.values(), ids=JOINED)
@torch.no_grad()
def test_learned_tokens_stay(join: Join, protected: tuple[int, ...]) -> None:
    net, x = Net(join), frames()
    found = rs_compile.optimize(net, KEEP, backend="eager")(x)
    assert (found - by_hand(net, x, protected)).abs().max() < 1e-12
    assert (found - by_hand(net, x, ())).abs().max() > 1e-3  # the oracle without them is another


MIXED: dict[str, tuple[Join, str]] = {
    "a convolution over the sequence": (
        lambda p, c, r: F.conv1d(front(p, c).flatten(0, 1).mT, torch.ones(C, C, 3).double() / 40, padding=1).mT,
        "aten.conv1d.default",
    ),
    "sorted by what is in the tokens": (
        lambda p, c, r: (y := front(p, c).flatten(0, 1)).gather(1, y.sum(-1).argsort(1)[..., None].expand(-1, -1, C)),
        "aten.gather.default",
    ),
}


@pytest.mark.parametrize(("join", "op"), MIXED.values(), ids=MIXED)
@torch.no_grad()
def test_what_cannot_be_followed_is_asked_for(join: Join, op: str) -> None:
    net, x = Net(join), frames()
    words = r"whether a token is learned \(a class token\) cannot be followed through " + op
    with pytest.raises(Refusal, match=words) as caught:
        rs_compile.optimize(net, KEEP, backend="eager")(x)
    assert "way out: name the tokens that must stay: Schedule(keep, protected=(0,))" in str(caught.value)
    for given in ((0,), ()):
        found = rs_compile.optimize(net, Schedule(KEEP, protected=given), backend="eager")(x)
        assert (found - by_hand(net, x, given)).abs().max() < 1e-12


def test_every_joint_token_of_a_schedule_by_hand_is_the_same() -> None:
    """What is found is what `protected` names."""
    join, protected = JOINED["joint"]
    net, x = Net(join), frames()
    named = rs_compile.optimize(net, Schedule(KEEP, protected=protected), backend="eager")(x)
    assert torch.equal(rs_compile.optimize(net, KEEP, backend="eager")(x), named)
