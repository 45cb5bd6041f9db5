"""What leaves the model has every token again; what reads the class token or a mean stays short.

The reference is a loop over blocks, one sample at a time, that remembers each token as it was when it left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import Block
from graphs import B, N, aten, prepared, rows, sample, table
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.graph.base import Refusal
from passes.graph.splice import ORIGIN
from passes.network.branches import find_blocks, find_branches
from passes.network.prunable import Answer, prunable
from passes.pipeline import prune
from passes.sites.restore import RestoreTokens, TokenOutput
from passes.sites.steps import Prune

KEEP = {0: 4, 1: 3}


class Net(nn.Module):
    """Three blocks, a final norm, and what the head does with norm(x) and the streams after the blocks."""

    def __init__(self, head: Callable[[Tensor, list[Tensor]], Any], prefix: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(scale=True) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(8), head
        self.cls = nn.Parameter(table(1, 1, 8)) if prefix else None

    def embed(self, x: Tensor) -> Tensor:
        return x * 2 if self.cls is None else torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        streams = []
        for block in self.blocks:
            x = block(x)
            streams.append(x)
        return self.head(self.norm(x), streams)


def tokens(y: Tensor, streams: list[Tensor]) -> Tensor:
    return y


class Reference:
    """Net on one sample, by a loop: streams after every block, short and with the tokens that left."""

    def __init__(self, model: Net, x: Tensor, keep: dict[int, int]) -> None:
        stream = model.embed(x[None])
        whole = stream.clone()
        self.index = torch.arange(stream.shape[1])
        self.short: list[Tensor] = []
        self.whole: list[Tensor] = []
        for i, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            middle = stream + block.scale1 * block.attn(block.norm1(stream))
            branch = block.scale2 * block.mlp(block.norm2(middle))
            stream = middle + branch
            whole = whole.index_copy(1, self.index, stream)
            if i in keep:
                shift = torch.linalg.vector_norm(branch - middle, dim=-1)[0]
                shift[: 1 if model.cls is not None else 0] = torch.inf
                stay = shift.topk(keep[i]).indices.sort().values
                stream, self.index = stream[:, stay], self.index[stay]
            self.short.append(stream)
            self.whole.append(whole)


def pruned(model: Net, x: Tensor, keep: dict[int, int] = KEEP, compact: bool = False) -> GraphModule:
    return prune(prepared(model, x), sites(keep), compact).gm


def sites(keep: dict[int, int]) -> list[Prune]:
    return [Prune(i, partial(lambda kept, _: kept, k)) for i, k in keep.items()]


@pytest.fixture(scope="module")
def captured() -> tuple[Net, GraphModule]:
    model = Net(tokens)
    return model, prepared(model, sample())


def origins(gm: GraphModule, origin: str) -> int:
    return sum(ORIGIN.get(n) == origin for n in gm.graph.nodes)


@pytest.mark.parametrize("keep", [{0: 4}, KEEP, {2: 2}, {0: 5, 1: 4, 2: 1}], ids=str)
@torch.no_grad()
def test_tokens_come_back_as_they_left(keep: dict[int, int], captured: tuple[Net, GraphModule]) -> None:
    """And before the final norm, so that it sees like with like."""
    (model, gm), x = captured, sample()
    found = prune(copy.deepcopy(gm), sites(keep)).gm(x)[0]
    assert found.shape == (B, N, 8)
    for b in range(B):
        wanted = model.norm(Reference(model, x[b], keep).whole[-1])[0]
        torch.testing.assert_close(found[b], wanted)


@torch.no_grad()
def test_taps_at_several_depths() -> None:
    """Each tap has every token, as the stream at that depth has it."""
    model, x = Net(lambda y, streams: (streams[0], F.layer_norm(streams[1], [8]), y)), sample()
    found = pruned(model, x)(x)
    for b in range(B):
        whole = Reference(model, x[b], KEEP).whole
        for tap, wanted in zip(found, (whole[0], F.layer_norm(whole[1], [8]), model.norm(whole[2])), strict=True):
            torch.testing.assert_close(tap[b], wanted[0])


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(lambda y, _: y[:, 0], id="class select"),
        pytest.param(lambda y, _: y.mean(1), id="mean"),
        pytest.param(lambda y, _: y[:, 1:].mean(1), id="mean over patches"),
        pytest.param(lambda y, _: (y[..., :1].softmax(1) * y).sum(1), id="attention pooling"),
    ],
)
@torch.no_grad()
def test_heads_read_the_short_sequence(head: Callable[[Tensor, list[Tensor]], Tensor]) -> None:
    model, x = Net(head, prefix=1), sample()
    gm = pruned(model, x)
    assert origins(gm, "restore") == 0
    assert not gm.graph.find_nodes(op="call_function", target=aten.scatter.src)
    found = gm(x)[0]
    for b in range(B):
        torch.testing.assert_close(found[b], head(model.norm(Reference(model, x[b], KEEP).short[-1]), [])[0])


@torch.no_grad()
def test_one_output_short_and_one_with_every_token() -> None:
    """Only the path to who needs every token is restored."""
    model, x = Net(lambda y, _: (y[:, 0], y), prefix=1), sample()
    gm = pruned(model, x)
    assert origins(gm, "restore") > 0
    pooled, every = gm(x)
    assert every.shape == (B, N + 1, 8)
    for b in range(B):
        reference = Reference(model, x[b], KEEP)
        torch.testing.assert_close(pooled[b], model.norm(reference.short[-1])[0, 0])
        torch.testing.assert_close(every[b], model.norm(reference.whole[-1])[0])


@torch.no_grad()
def test_compact_outputs_after_two_sites() -> None:
    """Short outputs come with their positions in the whole sequence, not in the one before."""
    model, x = Net(lambda y, streams: (streams[0], y, y.mean(1))), sample()
    dense = prepared(model, x)
    gm = prune(copy.deepcopy(dense), sites(KEEP), compact_outputs=True).gm
    assert origins(gm, "restore") == 0
    early, late, mean, early_kept, late_kept = gm(x)
    assert (early.shape, late.shape, mean.shape) == ((B, 4, 8), (B, 3, 8), (B, 8))
    assert (early_kept.shape, late_kept.shape) == ((B, 4), (B, 3))
    for b in range(B):
        reference = Reference(model, x[b], KEEP)
        assert late_kept[b].tolist() == reference.index.tolist()
        torch.testing.assert_close(early[b], reference.short[0][0])
        torch.testing.assert_close(late[b], model.norm(reference.short[-1])[0])
    whole = prune(dense, sites(KEEP)).gm(x)[1]
    torch.testing.assert_close(rows(whole, late_kept), late)
    output = TokenOutput(late, late_kept)
    assert output.tokens is late and output.kept is late_kept


def test_a_compact_output_of_another_sequence_refuses() -> None:
    model = Net(lambda y, _: y[:, 1:], prefix=1)
    gm = prepared(model, sample())
    with pytest.raises(Refusal) as refusal:
        prune(copy.deepcopy(gm), sites(KEEP), compact_outputs=True)
    assert refusal.value.reason == "an output runs over another sequence than the pruned one"
    restored = prune(gm, sites(KEEP)).gm(sample())[0]
    assert restored.shape == (B, N, 8)


def test_mixed_tokens_cannot_be_put_back() -> None:
    """A head with attention after the last block: no token that left has a value of its own there. They come back
    before it, so none leaves behind the last sum."""

    def head(y: Tensor, _: list[Tensor]) -> Tensor:
        return F.scaled_dot_product_attention(y, y, y)

    gm = prepared(Net(head), sample())
    with pytest.raises(Refusal) as refusal:
        prune(copy.deepcopy(gm), sites({2: 3}))
    assert refusal.value.reason == (
        "its result is read at full length (an output of the model), but it comes from an op that mixes tokens, "
        "and later layers depend on it; no layer lies between"
    )
    assert refusal.value.op == "aten.scaled_dot_product_attention.default"
    first, last = (prunable(gm, find_blocks(gm)[i], find_branches(gm)) for i in (1, 2))
    assert first.able and first.until == (find_blocks(gm)[2].output,)
    assert not last.able and last.reason == str(refusal.value).replace("\n", "; ")


def test_two_readers_share_what_is_put_back() -> None:
    gm = pruned(Net(lambda y, streams: (y, streams[-1])), sample(), {0: 4})
    assert len(gm.graph.find_nodes(op="call_function", target=aten.scatter.src)) == 1


def test_prunable_changes_nothing(captured: tuple[Net, GraphModule]) -> None:
    _, gm = captured
    before = str(gm.graph)
    assert prunable(gm, find_blocks(gm)[0], find_branches(gm)) == Answer(True)
    assert str(gm.graph) == before


@torch.no_grad()
def test_gradients_reach_through_the_restored_tokens() -> None:
    model, x = Net(tokens), sample()
    with torch.enable_grad():
        pruned(model, x, {0: 2})(x)[0].sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for name, p in model.named_parameters() if "0.mlp.down" in name
    )


def test_rewrites_are_counted() -> None:
    assert RestoreTokens() == RestoreTokens(())
    assert RestoreTokens().name == "RestoreTokens"
