"""A merge put into a block: by itself it changes nothing; what it refuses, in words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from blocks import Block, Stack
from generated import Config, GeneratedViT
from graphs import B, N, prepared, sample
from test_insert import values
from torch import Tensor, nn
from torch.fx import GraphModule

import rs_compile
from passes.graph.base import CompileError, Refusal
from passes.graph.ops import SDPA
from passes.network.branches import find_blocks
from passes.network.protected import Protected
from passes.sites.attention_scores import ClassAttention
from passes.sites.explicit_attention import write_out
from passes.sites.importance import Shift
from passes.sites.insert_merge import InsertMerge
from passes.sites.mergers import Merger, Stream, ToMe, VidTLDR
from passes.sites.site import SITE, Site

MERGERS = [Stream, ToMe, VidTLDR]


@pytest.fixture(scope="module")
def graph() -> GraphModule:
    torch.manual_seed(0)
    return prepared(Stack(Block(scale=True), Block()).eval(), sample())


def inserted(graph: GraphModule, r: int, **options: Any) -> tuple[GraphModule, Site]:
    gm = copy.deepcopy(graph)
    gm = InsertMerge(find_blocks(gm)[0], r, options.pop("guard", Protected(1, 0)), **options)(gm).gm
    return gm, SITE.of(gm)


@pytest.mark.parametrize("merger", MERGERS)
@torch.no_grad()
def test_a_site(graph: GraphModule, merger: type[Merger]) -> None:
    gm, site = inserted(graph, 2, by=merger(restore="copy"))
    assert site.place is not None and site.sizes is not None and site.left == N - 2 - 1
    stream, short, full, index, place, sizes = values(
        gm, site.stream, site.short, site.full, site.index, site.place, site.sizes
    )
    assert short.shape == (B, N - 2, stream.shape[-1]) and sizes.shape == index.shape == (B, N - 2)
    assert (index[:, 0] == 0).all() and torch.equal(short[:, 0], stream[:, 0])
    for b in range(B):
        for t in range(N):
            assert torch.equal(full[b, t], short[b, place[b, t]])
        alone = [i for i in range(N - 2) if (place[b] == i).sum() == 1]
        assert all(torch.equal(short[b, i], stream[b, index[b, i]]) and sizes[b, i] == 1 for i in alone)
    if merger is not VidTLDR:
        assert sizes.sum(1).tolist() == [N] * B
        torch.testing.assert_close((short * sizes.unsqueeze(-1)).sum(1), stream.sum(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("merger", MERGERS)
@torch.no_grad()
def test_a_merge_alone_is_bit_equal(graph: GraphModule, merger: type[Merger]) -> None:
    """Every token has its own value until its destination changes."""
    gm, site = inserted(graph, 3, by=merger())
    stream, full, short = values(gm, site.stream, site.full, site.short)
    assert torch.equal(stream, full)
    assert len({tuple(row) for row in short[0].tolist()}) == N - 3
    if merger is not VidTLDR:  # which writes the attention out, to read its map
        assert torch.equal(gm(sample())[0], graph(sample())[0])


def test_where_each_merger_merges(graph: GraphModule) -> None:
    block = find_blocks(graph)[0]
    assert block.attention is not None
    by: list[Merger] = [Stream(), ToMe(), VidTLDR(), VidTLDR(Shift()), VidTLDR(Shift("attention"))]
    names = [inserted(graph, 1, by=merger)[1].stream.name for merger in by]
    between, after = block.attention.add.name, block.output.name
    assert names == [after, between, between, after, between]


@torch.no_grad()
def test_attention_written_out_is_the_op(graph: GraphModule) -> None:
    """The same values, a map whose rows sum to 1, and the same map when asked again."""
    gm = copy.deepcopy(graph)
    wanted = gm(sample())
    op = gm.graph.find_nodes(op="call_function", target=SDPA)[0]
    map_ = write_out(gm, op)
    assert write_out(gm, op) is map_
    gm.graph.eliminate_dead_code()
    gm.recompile()
    (weights,) = values(gm, map_)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    torch.testing.assert_close(gm(sample())[0], wanted[0], atol=1e-6, rtol=0)


# bad input, through the front door


def run(model: nn.Module, images: Tensor, **schedule: Any) -> None:
    with torch.no_grad():
        rs_compile.optimize(model, rs_compile.Schedule(**schedule), backend="eager")(images)


def vit(**config: Any) -> tuple[nn.Module, Tensor]:
    model = GeneratedViT(Config(**{"grid": (4, 4), **config}))
    return model, model.images(2)


@pytest.mark.parametrize(
    ("prefix", "r", "protected", "words"),
    [
        (1, 9, None, "block 0 is to merge 9 of 17 tokens away, and at most 8 can"),
        (0, 9, None, "block 0 is to merge 9 of 16 tokens away, and at most 8 can"),
        (0, 0.6, None, "block 0 is to merge 9 of 16 tokens away, and at most 8 can"),
        (5, 9, None, "block 0 is to merge 9 of 21 tokens away, and at most 8 can"),
        (1, 7, (3, 4), "block 0 is to merge 7 of 17 tokens away, and at most 6 can"),
    ],
)
@pytest.mark.parametrize("by", [Stream(), ToMe()])
def test_more_than_may_merge(by: Merger, prefix: int, r: Any, protected: Any, words: str) -> None:
    with pytest.raises(CompileError, match=words + ": one of two, protected ones never; merge fewer there"):
        run(*vit(prefix=prefix, output="mean"), merge={0: r}, by=by, protected=protected)


def test_as_many_as_may_merge_do() -> None:
    model, images = vit(prefix=1)
    report = rs_compile.plan(model, rs_compile.Schedule(merge={0: 8, 1: 4}, by=rs_compile.ToMe()), images)
    assert [row.tokens_out for row in report.blocks[:2]] == [9, 5]


def test_a_cnn() -> None:
    with pytest.raises(Refusal) as refusal:
        run(torchvision.models.resnet18().eval(), torch.randn(2, 3, 32, 32), merge={0: 4})
    assert "the model has no residual MLP branch on [batch, tokens, channels]" in refusal.value.reason
    assert "Schedule(grid={stage: GridPrune(rows, columns)})" in refusal.value.way_out


def test_a_block_that_is_not_there() -> None:
    with pytest.raises(CompileError, match="names block 7, but the model has 2 blocks, 0 to 1"):
        run(*vit(), merge={7: 2})


def test_prune_and_merge_in_one_block() -> None:
    with pytest.raises(rs_compile.ScheduleError, match="block 1 both prunes and merges; leave it in one of keep and"):
        rs_compile.Schedule({1: 0.8}, merge={1: 2})


@pytest.mark.parametrize("parallel", ["left", "inner"])
@pytest.mark.parametrize("by", [ToMe(), VidTLDR()])
def test_no_place_between_attention_and_mlp(by: Merger, parallel: str) -> None:
    with pytest.raises(Refusal) as refusal:
        run(*vit(parallel=parallel), merge={0: 2}, by=by)
    assert refusal.value.reason == f"{by.kind} merges between attention and MLP, and block 0 has no such place"
    assert refusal.value.way_out == "use Schedule(by=Stream()), which merges after the complete block"


def test_class_attention_without_a_class_token() -> None:
    with pytest.raises(Refusal) as refusal:
        run(*vit(prefix=0, output="mean"), merge={0: 2}, by=VidTLDR(ClassAttention()))
    assert refusal.value.reason == "class attention needs a class token in front"


@pytest.mark.parametrize("attention", ["bmm", "baddbmm"])
def test_samples_and_heads_folded_into_one_dimension(attention: str) -> None:
    """A map [B H, N, N] has a row for each head, not each sample: reading it would weigh by the wrong sample."""
    with pytest.raises(Refusal, match="the attention of block 0 is not on") as refusal:
        run(*vit(attention=attention), merge={0: 2}, by=VidTLDR())
    assert refusal.value.way_out == "use Schedule(score=Shift()), which needs no attention map"
    with pytest.raises(Refusal, match="the attention of block 0 is not on"):
        run(*vit(attention=attention), keep={0: 0.7}, score=ClassAttention())
    with pytest.raises(Refusal, match="ToMe compares keys, and block 0 has no single attention on"):
        run(*vit(attention=attention), merge={0: 2}, by=ToMe())
    with pytest.raises(Refusal, match="this attention is not on"):
        run(*vit(attention=attention), merge={0: 2})
    run(*vit(attention=attention), merge={0: 2}, by=Stream(size_bias=False))


class Causal(nn.Module):
    """Causal attention on one head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


class CausalBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Causal()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


def test_causal_attention_with_size_bias() -> None:
    model = nn.Sequential(CausalBlock(), CausalBlock())
    with pytest.raises(Refusal) as refusal:
        run(model, sample(), merge={0: 2})
    assert refusal.value.reason == "causal attention, in which a merged token would stand at two places"
    assert refusal.value.way_out == "use Schedule(by=Stream(size_bias=False)), or prune instead of merging"
