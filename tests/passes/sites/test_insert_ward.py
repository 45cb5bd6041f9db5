"""Ward's merging at the inputs of attention: what merges, what follows, whose shift weighs, what it refuses."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import MLP, Attention, Block, Stack
from generated import Config, GeneratedViT
from graphs import B, N, prepared, sample
from test_insert import values
from torch import Tensor, nn
from torch.fx import GraphModule

import rs_compile
from passes.graph.base import Refusal
from passes.network.branches import block_before, find_blocks
from passes.network.protected import Protected
from passes.sites.insert_ward import InsertWard
from passes.sites.site import SITE, Site

WIDTH = 8


def inserted(graph: GraphModule, r: int, block: int = 0, before: int | None = None) -> tuple[GraphModule, Site]:
    gm = copy.deepcopy(graph)
    blocks = find_blocks(gm)
    gm = InsertWard(blocks[block], r, Protected(1, 0), None if before is None else blocks[before])(gm).gm
    return gm, SITE.of(gm)


@pytest.fixture(scope="module")
def graph() -> GraphModule:
    torch.manual_seed(0)
    return prepared(Stack(Block(), Block(scale=True)).eval(), sample())


@pytest.mark.parametrize(("block", "before"), [(0, None), (1, 0)])
@torch.no_grad()
def test_the_cheapest_edge(graph: GraphModule, block: int, before: int | None) -> None:
    """Of all pairs of an even and an odd token the one that Ward's cost is lowest of, weighted by the block before."""
    gm, site = inserted(graph, 1, block, before)
    blocks = find_blocks(graph)
    attention = blocks[block].attention_op()
    assert attention is not None and len(site.beside) == 3
    x, q, k, v = values(graph, blocks[block].entry, *attention.args[:3])
    weights = torch.ones(B, N)
    if before is not None:
        after, start = values(graph, blocks[before].mlp.term, blocks[before].mlp.stream)
        weights = (after - start).norm(dim=-1)
    heads = [short for _, short in site.beside.values()]
    short, index, sizes, *merged = values(gm, site.short, site.index, site.sizes, *heads)
    for b in range(B):
        cost = {}
        for t, u in itertools.product(range(2, N, 2), range(1, N, 2)):
            apart = sum(((z[b, :, t] - z[b, :, u]) ** 2).sum().item() for z in (k, v))
            cost[t, u] = 0.5 * apart * max(weights[b, t], weights[b, u]).item() ** 0.5
        source, to = min(cost, key=lambda edge: cost[edge])
        left = [t for t in range(N) if t != source]
        assert index[b].tolist() == left and sizes[b, left.index(to)] == 2 and sizes[b].sum() == N
        for whole, part in (
            (x[b], short[b]),
            *((z[b].transpose(0, 1), m[b].transpose(0, 1)) for z, m in zip((q, k, v), merged, strict=True)),
        ):
            wanted = whole.clone()
            wanted[to] = (whole[source] + whole[to]) / 2
            torch.testing.assert_close(part, wanted[left])


@torch.no_grad()
def test_by_itself_it_is_bit_equal(graph: GraphModule) -> None:
    gm, site = inserted(graph, 3, 1, 0)
    stream, full = values(gm, site.stream, site.full)
    assert torch.equal(stream, full) and torch.equal(gm(sample())[0], graph(sample())[0])


def test_which_block_leads_to_which() -> None:
    """Through the norm of post-norm blocks; never from another tower; not over what changes the number of tokens."""
    for order in ("pre", "post", "norm on the branch"):
        blocks = find_blocks(prepared(Stack(*(Block(order) for _ in range(3))).eval(), sample()))
        found = [block_before(blocks, b) for b in blocks]
        assert [None if b is None else b.index for b in found] == [None, 0, 1], order

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.ModuleList([Block(), Block()]) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2.0
            for one, two in zip(self.one, self.two, strict=True):
                x, y = one(x), two(y)
            return x.mean(1) + y.mean(1)

    blocks = find_blocks(prepared(Towers().eval(), sample()))
    found = [block_before(blocks, b) for b in blocks]
    assert [None if b is None else b.index for b in found] == [None, None, 0, 1]


class Gated(nn.Module):
    """Attention whose result a gate multiplies that has an entry per token."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.attention, self.gate, self.mlp, self.norm = (
            Attention(),
            nn.Linear(WIDTH, WIDTH),
            MLP(),
            nn.LayerNorm(WIDTH),
        )
        self.late = late

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        gate = None if self.late else self.gate(y).sigmoid()
        z = self.attention(y)
        x = x + z * (self.gate(y).sigmoid() if gate is None else gate)
        return x + self.mlp(x)


@pytest.mark.parametrize("late", [False, True])
@torch.no_grad()
def test_a_gate_on_the_branch_follows_the_destination(late: bool) -> None:
    torch.manual_seed(1)
    model = Stack(Gated(late), Block(), head=lambda x: x[:, 0]).eval()
    x, block = sample(), model.blocks[0]
    got = rs_compile.optimize(
        model, rs_compile.Schedule(merge={0: 2}, protected=(0,), by=rs_compile.Ward()), backend="eager"
    )(x)
    gm = prepared(model, x)
    site_gm, site = inserted(gm, 2)
    heads = [short for _, short in site.beside.values()]
    short, index, sizes, q, k, v = values(site_gm, site.short, site.index, site.sizes, *heads)
    gate = block.gate(block.norm(x * 1.5)).sigmoid().gather(1, index.unsqueeze(-1).expand(-1, -1, WIDTH))
    attended = F.scaled_dot_product_attention(q, k, v, sizes.log()[:, None, None, :])
    y = short + gate * block.attention.proj(attended.transpose(1, 2).flatten(2))
    y = y + block.mlp(y)
    last = model.blocks[1]
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in last.attn.qkv(last.norm1(y)).chunk(3, -1))
    attended = F.scaled_dot_product_attention(q, k, v, sizes.log()[:, None, None, :])
    y = y + last.attn.proj(attended.transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, (y + last.mlp(last.norm2(y)))[:, 0])


def test_the_report_counts_tokens_where_they_merge() -> None:
    """The block's own norm and queries see every token; after a pruned block, those that it left."""
    model = GeneratedViT(Config(depth=4, grid=(4, 5), prefix=1))
    schedule = rs_compile.Schedule({0: 0.8}, merge={1: 4, 3: 2}, by=rs_compile.Ward())
    report = rs_compile.plan(model, schedule, model.images(2))
    assert [(row.tokens_in, row.tokens_out) for row in report.blocks] == [(21, 17), (17, 13), (13, 13), (13, 11)]
    assert "merging: ward, size bias in attention as a mask" in str(report)


# refusals, in words


def run(model: nn.Module, x: Tensor, **schedule: Any) -> None:
    with torch.no_grad():
        rs_compile.optimize(model, rs_compile.Schedule(**schedule, by=rs_compile.Ward()), backend="eager")(x)


def refused(model: nn.Module, x: Tensor, **schedule: Any) -> str:
    with pytest.raises(Refusal) as refusal:
        run(model, x, **schedule)
    assert refusal.value.way_out == "use Schedule(by=Stream()), which merges after the complete block"
    return refusal.value.reason


@pytest.mark.parametrize("order", ["parallel", "parallel, inner sum"])
def test_an_mlp_beside_the_attention(order: str) -> None:
    assert refused(Stack(Block(order), Block()).eval(), sample(), merge={0: 2}) == (
        "ward merges at the inputs of attention, in front of the MLP, and block 0 has no such place"
    )


@pytest.mark.parametrize("attention", ["bmm", "baddbmm"])
def test_heads_folded_into_the_batch(attention: str) -> None:
    model = GeneratedViT(Config(grid=(4, 4), attention=attention))
    assert refused(model, model.images(2), merge={0: 2}) == (
        "Ward merges queries, keys and values, "
        "and block 0 has no single attention op on [batch, heads, tokens, channels]"
    )


class Memory(nn.Module):
    """Attention with keys and values of its own beside the tokens'."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.memory = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(1, 2, WIDTH))
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        memory = self.memory.expand(len(x), -1, -1)
        q, k, v = (t.unsqueeze(1) for t in (q, torch.cat([k, memory], 1), torch.cat([v, memory], 1)))
        x = x + F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.mlp(x)


def test_keys_that_no_token_has() -> None:
    assert refused(Stack(Memory(), Block()).eval(), sample(), merge={0: 2}) == (
        "Ward merges queries, keys and values, and block 0 attends with queries, keys or values "
        "that are not one for each token"
    )
