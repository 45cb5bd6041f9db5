"""A residual stream [N, C], one sample without a dimension of its own, against the same model on [1, N, C]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import prepared, sample, table
from torch import Tensor, nn

from passes.axes.token_axis import stream_layout
from passes.graph.layout import show
from passes.network.branches import blocks_of, find_blocks, find_branches
from rs_compile import ClassAttention, MeanAttention, Refusal, Schedule, Stream, ToMe, VidTLDR, explain, optimize

N, HEADS = 12, 2


class Block(nn.Module):
    """Pre-norm attention and MLP on [N, C], or [1, N, C]; angles with an entry per token."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.mask = mask

    def forward(self, x: Tensor, turned: Tensor) -> Tensor:
        lead = x.shape[:-2]
        q, k, v = self.qkv(F.layer_norm(x, (8,))).reshape(*lead, N, 3, HEADS, 4).unbind(-3)
        q, k, v = (t.transpose(-3, -2) for t in (q * turned[:, None], k * turned[:, None], v))
        if not lead:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        o = o.transpose(1, 2).reshape(*lead, N, 8)
        x = x + self.out(o)
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (8,)))))


class Tower(nn.Module):
    """Three blocks, a class token in front, and all of its values."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(mask) for _ in range(3)])
        self.first = nn.Parameter(table(1, 8))
        self.turned = nn.Parameter(table(N, 4))

    def forward(self, x: Tensor) -> Any:
        x = torch.cat([self.first.expand(*x.shape[:-2], 1, 8), x], -2)
        for block in self.blocks:
            x = block(x, self.turned)
        return x, x.mean(-2), x[..., 0, :]


def packed() -> Tensor:
    """[N - 1, C]."""
    return sample(tokens=N - 1, batch=1)[0].double()


SCHEDULES = [
    {0: 0.5, 1: 0.6},
    Schedule(keep={0: 0.5}, score=ClassAttention()),
    Schedule(keep={1: 0.5}, score=MeanAttention()),
    Schedule(keep={0: 0.5, 1: 0.5}, protected=(5,)),
    Schedule(merge={0: 3, 1: 2}),
    Schedule(merge={0: 3, 1: 2}, by=ToMe()),
    Schedule(merge={0: 3}, by=VidTLDR()),
    Schedule(merge={0: 3}, keep={1: 0.5}, by=Stream(weighted_mean=True)),
]


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_sequence_is_one_sample(schedule: Any) -> None:
    model, x = Tower().eval().double(), packed()
    got = optimize(model, schedule, backend="eager")(x)
    wanted = optimize(model, schedule, backend="eager")(x[None].expand(2, -1, -1))
    for a, b, dense in zip(got, wanted, model(x), strict=True):
        torch.testing.assert_close(a, b[0])
        assert not torch.allclose(a, dense)


@torch.no_grad()
def test_short_outputs_have_their_positions() -> None:
    model, x = Tower().eval().double(), packed()
    handle = optimize(model, {0: 0.5}, backend="eager", token_outputs="compact")
    full = optimize(model, {0: 0.5}, backend="eager")(x)[0]
    tokens, kept = handle(x)[0]
    assert kept.shape == (1, 6) and kept[0, 0] == 0
    torch.testing.assert_close(tokens, full[kept[0]])


def test_the_layout_has_no_samples() -> None:
    gm = prepared(Tower().eval().double(), packed())
    layout, batch = stream_layout(find_blocks(gm)[0].output, prefix=1)
    assert show(layout) == "[tokens(12), 8]" and batch.size == 1


def test_a_mask_may_keep_images_apart() -> None:
    apart = torch.block_diag(torch.ones(6, 6), torch.ones(6, 6)).bool()
    with pytest.raises(Refusal) as error:
        optimize(Tower(apart).eval().double(), {0: 0.5}, backend="eager")(packed())
    reason, _, way_out = str(error.value).splitlines()
    assert reason == (
        "aten.scaled_dot_product_attention.default (scaled_dot_product_attention_1): an input has an entry per pair of "
        "tokens, which may keep several images in one sequence apart, and later layers depend on it; no layer lies "
        "between [RSC-407]"
    )
    assert way_out.startswith("  way out: call the model with one image, prune after a later block")


class Rows(nn.Module):
    """Twelve samples whose code fixes their number: nothing lets them meet."""

    def __init__(self, meet: bool) -> None:
        super().__init__()
        self.block, self.up, self.down = Block(), nn.Linear(8, 16), nn.Linear(16, 8)
        self.turned = nn.Parameter(table(N, 4))
        self.meet = meet

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(N, 8)
        if self.meet:
            x = self.block(x, self.turned)
        return x + self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("meet", [True, False])
def test_entries_that_never_meet_are_samples(meet: bool) -> None:
    gm = prepared(Rows(meet).eval().double(), sample(tokens=8, batch=1)[0].repeat(2, 1)[:N].double())
    assert len(blocks_of(find_branches(gm))) == (2 if meet else 0)


def test_explain_counts_its_tokens() -> None:
    rows = explain(Tower().eval().double(), packed()).rows
    assert [(row.tokens, row.prunable) for row in rows] == [(12, True)] * 3
