"""Inserting a selection changes no result by itself; scores and kept tokens are what the formulas say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from blocks import MLP, Block, Stack
from graphs import B, N, aten, prepared, recorded, rows, sample
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.graph.base import Refusal
from passes.graph.layout import Fixed, Prunable
from passes.graph.splice import ORIGIN
from passes.network.branches import Block as Found
from passes.network.branches import find_blocks
from passes.network.protected import Protected
from passes.sites import score
from passes.sites.attention_scores import ClassAttention, MeanAttention
from passes.sites.importance import Lowest, Random, Score, Shift
from passes.sites.insert import InsertSelection
from passes.sites.site import SITE, Site

NONE = Protected(0, 0)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Stack(Block(scale=True), Block()).eval()


GRAPHS: dict[nn.Module, GraphModule] = {}


def graph(model: nn.Module) -> GraphModule:
    """A copy of the model's graph, captured once."""
    if model not in GRAPHS:
        GRAPHS[model] = prepared(model, sample())
    return copy.deepcopy(GRAPHS[model])


def inserted(
    model: nn.Module, at: int = 0, keep: int = 4, guard: Protected = NONE, **options: Any
) -> tuple[GraphModule, Site]:
    gm = graph(model)
    gm = InsertSelection(find_blocks(gm)[at], keep, guard, **options)(gm).gm
    return gm, SITE.of(gm)


def values(gm: GraphModule, *nodes: Node) -> list[Tensor]:
    """What these nodes compute for the sample input."""
    found = recorded(gm, sample())
    return [found[n] for n in nodes]


@pytest.mark.parametrize("keep", [N, 4, 1])
@torch.no_grad()
def test_alone_it_leaves_the_output_bit_equal(model: nn.Module, keep: int) -> None:
    gm, _ = inserted(model, keep=keep)
    assert torch.equal(gm(sample())[0], model(sample()))


def test_the_selection_is_live_and_the_rest_reads_what_was_put_back(model: nn.Module) -> None:
    gm, site = inserted(model)
    origins = {ORIGIN.of(n) for n in gm.graph.nodes if ORIGIN.known(n)}
    assert origins == {"score", "select", "gather", "restore"}
    outputs = gm.graph.output_node().all_input_nodes
    above: set[Node] = set()
    todo = list(outputs)
    while todo:
        node = todo.pop()
        if node not in above:
            above.add(node)
            todo += node.all_input_nodes
    assert {site.full, site.short, site.index, site.stream} <= above
    # nothing but the selection reads the stream any more
    assert all(ORIGIN.known(user) for user in site.stream.users)


@torch.no_grad()
def test_site(model: nn.Module) -> None:
    guard = Protected(1, 1)
    gm, site = inserted(model, keep=4, guard=guard)
    stream, short, full, index = values(gm, site.stream, site.short, site.full, site.index)
    assert index.shape == (B, 4) and (index[:, 0] == 0).all() and (index[:, -1] == N - 1).all()
    assert torch.equal(short, rows(stream, index)) and torch.equal(full, stream)
    assert site.left == 2 and site.tokens.pieces == (Fixed(1), Prunable(4), Fixed(1))
    assert site.axis is None and site.compact == {}


def between(found: Found, operation: str, with_skip: bool) -> tuple[Node, Node]:
    if operation == "block":
        return found.output, found.entry
    branch = found.mlp if operation == "mlp" else found.attention
    assert branch is not None
    return (branch.add if with_skip else branch.term), branch.stream


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize(
    ("operation", "metric", "with_skip"),
    [("mlp", "l2", False), ("mlp", "l1", True), ("attention", "cosine", False), ("block", "l2", False)],
)
@torch.no_grad()
def test_the_tokens_that_stay(model: nn.Module, operation: Any, metric: Any, with_skip: bool, lowest: bool) -> None:
    by = Shift(operation, metric, with_skip)
    gm, site = inserted(model, at=1, score=Lowest(by) if lowest else by)
    found = find_blocks(graph(model))[1]  # the same names in a graph without selections
    nodes = {n.name: n for n in gm.graph.nodes}
    after, before, index = values(gm, *(nodes[n.name] for n in between(found, operation, with_skip)), site.index)
    wanted = score.shift(after, before, metric).topk(4, largest=not lowest).indices.sort().values
    assert torch.equal(index, wanted)


@pytest.mark.parametrize("by", [ClassAttention(), MeanAttention()])
@torch.no_grad()
def test_attention_scores(model: nn.Module, by: Score) -> None:
    guard = Protected(1, 0) if by == ClassAttention() else NONE
    gm, site = inserted(model, guard=guard, score=by)
    # in another graph, where attention is still one op
    op = graph(model).graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)[0]
    query, key = (next(n for n in gm.graph.nodes if n.name == arg.name) for arg in op.args[:2])
    query, key, index = values(gm, query, key, site.index)
    attention = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
    scores = attention[:, :, 0].mean(1) if guard.prefix else attention.mean((1, 2))
    if guard.prefix:
        scores[:, 0] = torch.inf
    assert torch.equal(index, scores.topk(4).indices.sort().values)


@torch.no_grad()
def test_random_scores_differ_by_run_and_sample(model: nn.Module) -> None:
    torch.manual_seed(0)
    gm, site = inserted(model, score=Random())
    runs = {str(values(gm, site.index)[0].tolist()) for _ in range(4)}
    assert len(runs) > 1
    (index,) = values(gm, site.index)
    assert (index.diff(dim=1) > 0).all()


@torch.no_grad()
def test_a_token_in_the_middle_stays_by_its_original_position(model: nn.Module) -> None:
    """After an earlier selection a protected token stands elsewhere, in every sample at its own place."""
    gm = graph(model)
    blocks = find_blocks(gm)
    guard = Protected(0, 0, (3,))
    gm = InsertSelection(blocks[0], 4, guard)(gm).gm
    first = SITE.take(gm)
    (kept,) = values(gm, first.index)
    assert (kept == 3).any(1).all() and first.tokens.pieces == (Prunable(N),)
    places = (kept == 3).int().argmax(1)
    assert len(set(places.tolist())) > 1 or places[0] < 3


def test_what_cannot_be_scored() -> None:
    torch.manual_seed(0)

    class OnlyMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = MLP()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)

    model = Stack(OnlyMLP())
    with pytest.raises(Refusal) as refusal:
        inserted(model, score=Shift("attention"))
    assert refusal.value.reason == "block 0 has no attention branch to score by"
    assert refusal.value.way_out == 'use Schedule(score=Shift(of="mlp"))'
    with pytest.raises(Refusal) as refusal:
        inserted(model, score=MeanAttention())
    assert refusal.value.reason == "block 0 has no single attention op to take a map from"
    assert refusal.value.way_out == "use Schedule(score=Shift()), which needs no attention map"
    with pytest.raises(Refusal) as refusal:
        inserted(Stack(Block()), score=ClassAttention())
    assert refusal.value.reason == "class attention needs a class token in front"
    assert refusal.value.way_out == "use Schedule(score=MeanAttention()) or Shift()"
