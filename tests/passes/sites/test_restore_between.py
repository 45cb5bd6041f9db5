"""Where a layer in the middle needs every token, they are back before it, and may leave again behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from blocks import Block
from graphs import B, N, aten, prepared, sample
from torch import Tensor, nn

from passes.axes.token_axis import WAY_OUT
from passes.graph.base import Refusal
from passes.network.branches import find_blocks, find_branches
from passes.network.prunable import Answer, prunable
from passes.pipeline import prune
from passes.sites.outcome import Compiled
from passes.sites.restore import TokenOutput
from passes.sites.sizes import KEY_SIZES
from passes.sites.steps import Merge, Prune
from rs_compile import Shift, Stream

WINDOW = 3
Head = Callable[[Tensor, list[Tensor]], Any]


class Windowed(Block):
    """A block whose attention sees windows of three tokens."""

    def __init__(self) -> None:
        super().__init__()
        attn = self.attn
        self.attn = nn.Sequential(
            nn.Unflatten(1, (-1, WINDOW)), nn.Flatten(0, 1), attn, nn.Unflatten(0, (-1, N // WINDOW))
        )
        self.attn.append(nn.Flatten(1, 2))


class Net(nn.Module):
    """Blocks with global ("g") and windowed ("w") attention."""

    def __init__(self, kinds: str, head: Head = lambda x, _: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Windowed() if kind == "w" else Block() for kind in kinds])
        self.head = head

    def forward(self, x: Tensor) -> Any:
        x, streams = x * 1.5, []
        for block in self.blocks:
            x = block(x)
            streams.append(x)
        return self.head(x, streams)


def by_hand(model: Net, x: Tensor, keep: dict[int, int]) -> list[tuple[Tensor, Tensor]]:
    """For one sample [N, C] the short stream after each block, and the places of its tokens."""
    whole, index, after = x[None] * 1.5, torch.arange(N), []
    stream = whole
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if isinstance(block, Windowed):
            stream, index = whole, torch.arange(N)
        middle = stream + block.attn(block.norm1(stream))
        branch = block.mlp(block.norm2(middle))
        stream = middle + branch
        whole = whole.index_copy(1, index, stream)
        if i in keep:
            shift = torch.linalg.vector_norm(branch - middle, dim=-1)[0]
            stay = shift.topk(keep[i]).indices.sort().values
            stream, index = stream[:, stay], index[stay]
        after.append((stream[0], index))
    return after


def sites(keep: dict[int, int]) -> list[Prune]:
    return [Prune(i, partial(lambda kept, _: kept, k)) for i, k in keep.items()]


def made(model: Net, steps: Any, **options: Any) -> Compiled:
    return prune(prepared(model, sample()), steps, **options)


@pytest.mark.parametrize(
    ("kinds", "keep"),
    [
        ("wggwg", {0: 4}),
        ("gggw", {0: 4, 1: 3}),
        ("ggwggw", {0: 4, 3: 2}),
        ("ggwgg", {0: 4, 2: 5, 3: 3}),
        ("wgw", {0: 2}),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_window_sees_every_token(kinds: str, keep: dict[int, int]) -> None:
    """Those that left as they were, the others as the layers between made them."""
    model, x = Net(kinds, lambda x, _: x.mean(1)), sample()
    found = made(model, sites(keep)).gm(x)[0]
    for b in range(B):
        torch.testing.assert_close(found[b], by_hand(model, x[b], keep)[-1][0].mean(0))
    assert not torch.allclose(found, model(x), atol=1e-3)


def test_tokens_in_and_out_of_each_block() -> None:
    """As many as run through it: all of them are back at the end of a block that a window follows."""
    kinds = "gggwgg"
    blocks = made(Net(kinds), sites({0: 4, 1: 3, 4: 5})).blocks
    assert [b.tokens_in for b in blocks] == [6, 4, 3, 6, 6, 5]
    assert [b.tokens_out for b in blocks] == [4, 3, 6, 6, 5, 5]
    assert [b.macs < b.macs_dense for b in blocks] == [False, True, True, False, False, True]


def test_where_tokens_are_back() -> None:
    gm = prepared(Net("gggwg"))
    blocks, branches = find_blocks(gm), find_branches(gm)
    answers = [prunable(gm, block, branches) for block in blocks]
    assert answers[0] == answers[1] == Answer(True, until=(blocks[2].output,))
    assert answers[3] == answers[4] == Answer(True)
    assert not answers[2].able and "; no layer lies between" in answers[2].reason


@pytest.mark.parametrize("keep", [{1: 4}, {0: 5, 1: 4}], ids=str)
def test_no_layer_between(keep: dict[int, int]) -> None:
    """Alone, and at the end of a stretch that an earlier site opened."""
    with pytest.raises(Refusal) as refusal:
        made(Net("ggw"), sites(keep))
    assert refusal.value.reason.endswith(
        "attends to rows or columns of the tokens' grid alone, and later layers depend on it; no layer lies between"
    )
    assert refusal.value.op == "aten.scaled_dot_product_attention.default" and refusal.value.way_out == WAY_OUT


@torch.no_grad()
def test_a_site_that_keeps_all_asks_for_nothing() -> None:
    model, x = Net("ggw"), sample()
    torch.testing.assert_close(made(model, sites({0: 4, 1: N})).gm(x), made(model, sites({0: 4})).gm(x))


@torch.no_grad()
def test_taps_on_both_sides() -> None:
    """An output that was made before the window and one behind it both have every token."""
    model, x = Net("ggwg", lambda x, streams: (torch.cat([streams[0], x], -1), streams[1])), sample()
    keep = {0: 4}
    both, before = made(model, sites(keep)).gm(x)
    for b in range(B):
        after = by_hand(model, x[b], keep)
        first = by_hand(model, x[b], {})[0][0]
        torch.testing.assert_close(both[b], torch.cat([first, after[3][0]], -1))
        stream, index = after[1]
        torch.testing.assert_close(before[b], first.index_copy(0, index, stream))


@torch.no_grad()
def test_short_outputs() -> None:
    """Each with its places in the whole sequence, which starts anew behind the window."""
    model, x = Net("ggwgg", lambda x, streams: (streams[0], streams[2], x)), sample()
    keep = {0: 4, 3: 3}
    gm = made(model, sites(keep), compact_outputs=True).gm
    early, middle, late, *kept = gm(x)
    outputs = [TokenOutput(early, kept[0]), TokenOutput(late, kept[1])]
    assert len(kept) == 2 and middle.shape == (B, N, 8)
    for b in range(B):
        after = by_hand(model, x[b], keep)
        for output, (stream, index) in zip(outputs, (after[0], after[4]), strict=True):
            torch.testing.assert_close(output.tokens[b], stream)
            assert output.kept[b].tolist() == index.tolist()
        torch.testing.assert_close(middle[b], after[2][0])


@torch.no_grad()
def test_what_merged_counts_one_token_again() -> None:
    """Behind the window each token stands for itself, with its destination's value."""
    model, x = Net("ggwg", lambda x, streams: (streams[1], x)), sample()
    gm = made(model, [Merge(0, lambda n: 2, Stream(restore="copy"))]).gm
    attentions = gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    biased = [n for n in attentions if n.args[3:4] not in ((), (None,)) or n.kwargs.get("attn_mask") is not None]
    assert biased == attentions[1:2] and not any(KEY_SIZES.known(n) for n in attentions[2:])
    before, found = gm(x)
    assert all(len(before[b].unique(dim=0)) == N - 2 for b in range(B))
    stream = before
    for block in list(model.blocks)[2:]:
        stream = block(stream)
    torch.testing.assert_close(found, stream)


def test_gradients_reach_through_what_came_back() -> None:
    model, x = Net("ggwg"), sample()
    made(model, sites({0: 2})).gm(x)[0].square().sum().backward()
    used = [p for name, p in model.named_parameters() if "mlp.down" in name or "mlp.up" in name]
    assert len(used) == 16 and all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in used)


class Skips(nn.Module):
    """Two global blocks, a windowed one, and behind it a layer that reads an earlier stream as well.

    Args:
        middle: whether that is the stream in the middle of the second block, or at its end.
    """

    def __init__(self, middle: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block(), Windowed(), Block()])
        self.join, self.middle = nn.Linear(16, 8), middle

    def forward(self, x: Tensor) -> Tensor:
        first, second, window, last = self.blocks
        x = first(x * 1.5)
        x = between = x + second.attn(second.norm1(x))
        x = x + second.mlp(second.norm2(x))
        early = between if self.middle else x
        return last(self.join(torch.cat([early, window(x)], -1)))


@torch.no_grad()
def test_tokens_back_in_the_middle_of_a_block() -> None:
    """Its MLP scores every token; its attention ran on the others only."""
    model, x = Skips(middle=True).eval(), sample()
    gm = prepared(model)
    blocks = find_blocks(gm)
    assert prunable(gm, blocks[0], find_branches(gm)).until == (blocks[1].attention.add,)
    compiled = prune(copy.deepcopy(gm), sites({0: 4}))
    assert [b.tokens_in for b in compiled.blocks] == [6, 4, 6, 6] and compiled.gm(x)[0].shape == x.shape
    with pytest.raises(Refusal) as refusal:
        prune(gm, [Prune(0, lambda n: 4), Prune(1, lambda n: 3, Shift("block"))])
    assert refusal.value.reason == "tokens that left before block 1 come back inside of it, and not all have a score"
    assert refusal.value.way_out == 'use Schedule(score=Shift(of="mlp")), or prune after another block'


@torch.no_grad()
def test_a_skip_around_the_window_ends_the_stretch_earlier() -> None:
    """What is read behind the window comes from a sum with every token."""
    model, x = Skips().eval(), sample()
    gm = prepared(model)
    blocks, branches = find_blocks(gm), find_branches(gm)
    assert prunable(gm, blocks[0], branches).until == (blocks[1].output,)
    assert "no layer lies between" in prunable(gm, blocks[1], branches).reason
    assert prune(gm, sites({0: 4})).gm(x)[0].shape == x.shape
