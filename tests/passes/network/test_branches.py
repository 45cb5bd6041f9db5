"""Residual branches and blocks, found by dataflow in blocks of every usual make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import MLP, WIDTH, Attention, Block, Stack
from graphs import aten, graph_of, prepared, recorded, sample
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.network.branches import Branch, ancestors, find_blocks, find_branches


def kinds(gm: GraphModule) -> list[str]:
    return [b.kind for b in find_branches(gm)]


def check_values(gm: GraphModule, branches: list[Branch], x: Tensor) -> None:
    """By running the graph: the sum really is the stream and its terms."""
    values = recorded(gm, x)
    for branch in branches:
        others = [b.term for b in branches if b.add is branch.add]
        total = values[branch.stream] + sum(values[t] for t in others)
        torch.testing.assert_close(values[branch.add], total)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(lambda: Block(), id="pre-norm"),
        pytest.param(lambda: Block("post"), id="post-norm"),
        pytest.param(lambda: Block("parallel"), id="parallel"),
        pytest.param(lambda: Block("parallel, inner sum"), id="parallel, inner sum"),
        pytest.param(lambda: Block("branch on the left"), id="branch on the left"),
        pytest.param(lambda: Block("norm on the branch"), id="norm on the branch"),
        pytest.param(lambda: Block(scale=True), id="LayerScale"),
        pytest.param(lambda: Block(mlp="swiglu"), id="SwiGLU"),
        pytest.param(lambda: Block(mlp="sub-norm"), id="sub-LN"),
        pytest.param(lambda: Block(mlp="grn"), id="inner residual"),
    ],
)
@torch.no_grad()
def test_two_blocks(block: Callable[[], Block]) -> None:
    x = sample()
    model = Stack(block(), block())
    gm = prepared(model, x)
    blocks, branches = find_blocks(gm), find_branches(gm)
    assert sorted(kinds(gm)) == ["attention", "attention", "mlp", "mlp"]
    assert [b.index for b in blocks] == [0, 1]
    check_values(gm, branches, x)
    attentions = [b for b in branches if b.kind == "attention"]
    assert [b.attention for b in blocks] == attentions
    for i, found in enumerate(blocks):
        assert found.output is found.mlp.add and found.attention is not None
        assert found.entry is found.attention.stream
        op = found.attention_op()
        assert op is not None and op.target is aten.scaled_dot_product_attention.default
        assert found.where.startswith(f"blocks.{i}")
    assert blocks[0].mlp.nodes.isdisjoint(blocks[1].mlp.nodes)


@torch.no_grad()
def test_token_first_stream() -> None:
    """[N, B, C] throughout: the samples are dimension 1."""
    first, second = Block(token_first=True), Block(token_first=True)
    x = sample()
    embed = Stack(first, second, head=lambda x: x.mean(0))

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = embed

        def forward(self, x: Tensor) -> Tensor:
            return self.stack(x.transpose(0, 1))

    gm = prepared(Turned(), x)
    assert kinds(gm) == ["attention", "mlp"] * 2
    assert [b.attention is not None for b in find_blocks(gm)] == [True, True]
    assert find_blocks(gm)[1].where == "stack.blocks.1"


def test_layer_scale_belongs_to_the_branch() -> None:
    gm = prepared(Stack(Block(scale=True)))
    (block,) = find_blocks(gm)
    assert block.mlp.term.target is aten.mul.Tensor
    assert block.mlp.stream.target is aten.add.Tensor


def test_the_norm_of_a_post_norm_block_is_no_part_of_it() -> None:
    gm = prepared(Stack(Block("post"), Block("post")))
    blocks = find_blocks(gm)
    assert blocks[0].mlp.stream.target is aten.layer_norm.default
    assert blocks[0].output.target is aten.add.Tensor
    assert blocks[1].attention is not None and blocks[1].attention.stream.target is aten.layer_norm.default


class LongSkip(nn.Module):
    """Adds the first block's input to the last one's output, as a U-shaped network does."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.first, self.second, self.skip = Block(), Block(), nn.Linear(WIDTH, WIDTH)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.second(self.first(x))
        return (x + (self.skip(y) if self.linear else y)).mean(1)


@pytest.mark.parametrize("linear", [False, True])
def test_a_long_skip_around_blocks_is_no_branch(linear: bool) -> None:
    gm = prepared(LongSkip(linear))
    assert kinds(gm) == ["attention", "mlp"] * 2


def test_mlp_before_its_attention() -> None:
    """The attention of a block is the one whose output the MLP reads; the first MLP here has none."""
    blocks = find_blocks(prepared(Stack(Block("mlp first"), Block("mlp first"))))
    assert [b.attention is None for b in blocks] == [True, False]
    assert blocks[1].attention is not None and blocks[1].attention.add is blocks[1].mlp.stream


class Two(nn.Module):
    """Two attention branches, then one MLP (as with cross attention, or two windows)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mlp = Attention(), Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        x = x + self.a(x)
        x = x + self.b(x)
        return (x + self.mlp(x)).mean(1)


def test_the_nearest_attention_belongs_to_the_block() -> None:
    gm = prepared(Two())
    (block,) = find_blocks(gm)
    attentions = [b for b in find_branches(gm) if b.kind == "attention"]
    assert len(attentions) == 2 and block.attention == attentions[1]


class PlusPositions(nn.Module):
    """Adds a table between attention and MLP, and normalises the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.norm = Attention(), MLP(), nn.LayerNorm(WIDTH)
        self.places = nn.Parameter(torch.randn(6, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        x = self.norm(x + self.attn(x) + self.places)
        return (x + self.mlp(x)).mean(1)


def test_constants_between_attention_and_mlp() -> None:
    gm = prepared(PlusPositions())
    (block,) = find_blocks(gm)
    assert kinds(gm) == ["attention", "mlp"]
    assert block.attention is not None


def test_an_inner_residual_of_linear_layers_wins_over_the_outer() -> None:
    """Of nested branches the inner one is the finer cut; it is an MLP of the hidden channels."""
    gm = prepared(Stack(Block(mlp="inner")))
    mlps = [b for b in find_branches(gm) if b.kind == "mlp"]
    assert len(mlps) == 1 and find_blocks(gm)[0].mlp == mlps[0]


class TokenMixing(nn.Module):
    """MLP-Mixer: a linear layer over tokens, then one over channels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.over_tokens = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "linear":
            return x + self.over_tokens(x.transpose(1, 2)).transpose(1, 2)
        if self.kind == "scan":
            return x + self.mlp(x.cumsum(1))
        if self.kind == "mean":
            return x + self.mlp(x - x.mean(1, keepdim=True))
        return x + self.mlp(x.roll(1, 1))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("linear", "aten.linear.default: a linear layer over the tokens, of a fixed size"),
        ("scan", "aten.cumsum.default: an op along a dimension that runs over the token axis"),
        ("shift", "aten.roll.default: changes the order of the tokens"),
    ],
)
def test_a_mixer_is_no_mlp(kind: str, reason: str) -> None:
    gm = prepared(Stack(TokenMixing(kind)))
    (branch,) = find_branches(gm)
    assert (branch.kind, branch.reason) == ("mixer", reason)
    assert branch.at is not None and reason.startswith(f"{branch.at.target}: ")
    assert find_blocks(gm) == []


def test_without_mlps_the_mixers_are_the_blocks() -> None:
    gm = prepared(Stack(TokenMixing("mean"), TokenMixing("mean")))
    assert kinds(gm) == ["mixer", "mixer"]
    blocks = find_blocks(gm)
    assert [b.where for b in blocks] == ["blocks.0", "blocks.1"]
    assert [b.mlp for b in blocks] == find_branches(gm) and blocks[1].mlp.stream is blocks[0].output


def test_a_mixer_beside_mlps_is_no_block() -> None:
    gm = prepared(Stack(TokenMixing("mean"), Block()))
    assert kinds(gm) == ["mixer", "attention", "mlp"]
    (block,) = find_blocks(gm)
    assert block.mlp.kind == "mlp"


class Float32Stream(nn.Module):
    """The stream is cast to float32 before the sum, as Mamba models keep it; the branch reads it as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() + self.mlp(x)).to(x.dtype)


def test_casts_of_the_stream_hide_no_block() -> None:
    model = Stack(Float32Stream(), Float32Stream()).bfloat16()
    gm = prepared(model, torch.randn(2, 6, WIDTH, dtype=torch.bfloat16))
    blocks = find_blocks(gm)
    assert kinds(gm) == ["mlp", "mlp"]
    assert blocks[0].mlp.stream.meta["val"].dtype == torch.bfloat16 and blocks[1].mlp.stream is blocks[0].output


class ConvBlock(nn.Module):
    def __init__(self, mlp: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.mlp = MLP() if mlp else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x)
        if self.mlp is not None:  # ConvNeXt
            y = self.mlp(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + y.relu()


def test_convolution_blocks() -> None:
    images = torch.randn(2, WIDTH, 5, 4)
    gm = prepared(Stack(ConvBlock(False), ConvBlock(False), head=lambda x: x.mean((2, 3))), images)
    assert kinds(gm) == ["conv", "conv"] and find_blocks(gm) == []
    gm = prepared(Stack(ConvBlock(True), head=lambda x: x.mean((2, 3))), images)
    (branch,) = find_branches(gm)
    assert branch.kind == "mixer" and "needs the tokens on their full grid" in branch.reason


MODEL = MLP().requires_grad_(False)


@pytest.mark.parametrize(
    "network",
    [
        lambda x: MLP.forward(MODEL, x),  # no skip
        lambda x: x + 1,
        lambda x: x + x,
        lambda x: x + x.relu(),  # no linear layer
        lambda x: x + MODEL.down(MODEL.up(x)).mean() * 0 + torch.ones(8),
        lambda x: x - MODEL.forward(x),
        lambda x: torch.add(x, MODEL.forward(x), alpha=2),
        lambda x: x + F.linear(x, torch.ones(8, 8)),  # one linear layer is no MLP
        lambda x: x.relu() + MODEL.forward(x.sigmoid()),  # not computed from what it is added to
    ],
)
def test_no_residual_no_block(network: Callable[[Tensor], Tensor]) -> None:
    gm = graph_of(network)
    assert find_blocks(gm) == []


def test_positions_are_no_branch() -> None:
    gm = graph_of(lambda x, t: x + t.relu(), tables=(torch.randn(6, 8),))
    assert find_branches(gm) == []


def test_ancestors() -> None:
    """Bit 0 says whether a value holds what is in the image: its size alone does not count."""
    gm = graph_of(lambda x, t: (x.relu(), t * 2, t.expand(x.shape[0], -1, -1)), tables=(torch.randn(1, 2, 8),))
    above = ancestors(gm)
    outputs: Any = gm.graph.output_node().args[0]
    assert [above[n] & 1 for n in outputs] == [1, 0, 0]
    order = {n: i + 1 for i, n in enumerate(gm.graph.nodes)}
    relu = outputs[0]
    assert above[relu] >> order[relu.args[0]] & 1 and not above[relu] >> order[relu] & 1


def test_hand_written_attention_that_cannot_be_lowered_is_attention() -> None:
    """Heads mixed between softmax and values: no SDPA, but not an MLP either."""

    def network(x: Tensor, mix: Tensor) -> Tensor:
        q = x.reshape(-1, 6, 2, 4).transpose(1, 2)
        weights = (q @ q.transpose(-1, -2)).softmax(-1)
        weights = F.linear(weights.permute(0, 2, 3, 1), mix).permute(0, 3, 1, 2)
        return x + (weights @ q).transpose(1, 2).flatten(2)

    gm = graph_of(network, tables=(torch.randn(2, 2),))
    (branch,) = find_branches(gm)
    assert (branch.kind, branch.reason) == ("attention", "its attention is not in a form that can be lowered")
