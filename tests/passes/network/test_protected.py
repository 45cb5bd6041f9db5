"""Which tokens must stay, read off how the sequence was put together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from blocks import Block
from graphs import aten, graph_of, leaves, only, prepared, sample, table
from torch import Tensor, nn

from passes.network.branches import find_blocks, find_branches
from passes.network.protected import Protected, find_protected, with_picked

CLASS, TWO = table(1, 1, 8), table(1, 2, 8, seed=2)


def put(x: Tensor, *front: Tensor, back: tuple[Tensor, ...] = ()) -> Tensor:
    """The sequence with learned tokens at both ends."""
    size = x.shape[0]
    return torch.cat([*(t.expand(size, -1, -1) for t in front), x, *(t.expand(size, -1, -1) for t in back)], 1)


CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], Protected]] = {
    "a class token for each window": (
        lambda x, c: torch.cat([put(x, c)[:, :1].repeat(2, 1, 1), x.reshape(-1, 3, 8)], 1),
        (CLASS,),
        Protected(1, 0),
    ),
    "repeated along the tokens": (lambda x, c: put(x, c, back=(c,)).repeat(1, 2, 1), (CLASS,), Protected(1, 1, (7, 8))),
    "none": (lambda x: x + 1, (), Protected(0, 0)),
    "class token": (lambda x, c: put(x, c), (CLASS,), Protected(1, 0)),
    "class and registers": (lambda x, c, r: put(x, c, r), (CLASS, TWO), Protected(3, 0)),
    "suffix": (lambda x, d: put(x, back=(d,)), (TWO,), Protected(0, 2)),
    "both": (lambda x, c, d: put(x, c, back=(d,)), (CLASS, TWO), Protected(1, 2)),
    "in the middle": (
        lambda x, c: torch.cat([x[:, :3], c.expand(x.shape[0], -1, -1), x[:, 3:]], 1),
        (CLASS,),
        Protected(0, 0, (3,)),
    ),
    "front and middle": (
        lambda x, c: torch.cat([put(x[:, :3], c), put(x[:, 3:], c)], 1),
        (CLASS,),
        Protected(1, 0, (4,)),
    ),
    "positions added": (lambda x, c, t: put(x, c) + t, (CLASS, table(1, 7, 8)), Protected(1, 0)),
    "positions [N, C]": (lambda x, c, t: put(x, c) + t, (CLASS, table(7, 8)), Protected(1, 0)),
    "positions by slices": (
        lambda x, c, t: put(x + t[:, 1:], c + t[:, :1]),
        (CLASS, table(1, 7, 8)),
        Protected(1, 0),
    ),
    "norm and dropout": (
        lambda x, c: F.dropout(F.layer_norm(put(x, c), [8]), 0.1, False).contiguous(),
        (CLASS,),
        Protected(1, 0),
    ),
    "cast": (lambda x, c: put(x, c).double(), (CLASS,), Protected(1, 0)),
    "scaled": (lambda x, c: put(x, c) * c.sum() * 2, (CLASS,), Protected(1, 0)),
    "token first": (lambda x, c: put(x, c).transpose(0, 1).relu(), (CLASS,), Protected(1, 0)),
    "token first, by permute": (lambda x, c: put(x, c).permute(1, 0, 2) + 1, (CLASS,), Protected(1, 0)),
    "joined twice": (lambda x, c, r: put(put(x, c) + 1, r), (CLASS, TWO), Protected(3, 0)),
    "a slice of it": (lambda x, c, r: put(x, c, r)[:, 1:] * 2, (CLASS, TWO), Protected(2, 0)),
    "channels joined": (lambda x, c: torch.cat([put(x, c), put(x, c)], -1)[..., :8], (CLASS,), Protected(1, 0)),
    "a mean of the image in front": (lambda x: torch.cat([x.mean(1, keepdim=True), x], 1), (), Protected(0, 0)),
    "class token with something of the image": (
        lambda x, c: put(x, c) + x.mean((1, 2))[:, None, None],
        (CLASS,),
        Protected(0, 0),
    ),
    "zeros in front": (lambda x: torch.cat([x.new_zeros(x.shape[0], 1, 8), x], 1), (), Protected(1, 0)),
    "only learned tokens": (lambda x, t: t.expand(x.shape[0], -1, -1) * 2, (TWO,), Protected(2, 0)),
}


@pytest.mark.parametrize(("network", "tables", "wanted"), CASES.values(), ids=CASES)
def test_protected(network: Callable[..., Tensor], tables: tuple[Tensor, ...], wanted: Protected) -> None:
    gm = graph_of(network, tables=tables)
    (stream,) = leaves(gm)
    shape = stream.meta["val"].shape
    dim = next(d for d in range(2) if isinstance(shape[d], int))
    assert find_protected(gm, stream, dim) == wanted


def test_counts() -> None:
    assert Protected.of([True, True, False, True, False, True]) == Protected(2, 1, (3,))
    assert Protected.of([False] * 4) == Protected(0, 0)
    assert Protected.of([True] * 3) == Protected(3, 0)
    assert Protected.of([False, False, True]) == Protected(0, 1)
    assert Protected(2, 1, (3,)).count == 4


class LateClass(nn.Module):
    """CaiT: the class token joins after the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(CLASS.clone())
        self.first, self.second = Block(), Block("post")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x * 2)
        return self.second(torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1))[:, 0]


def test_through_the_blocks_up_to_where_a_token_joins() -> None:
    """Attention spreads the image to every token: what counts is what the stream was before the sums."""
    gm = prepared(LateClass(), sample())
    blocks = find_blocks(gm)
    assert [find_protected(gm, b.output, 1) for b in blocks] == [Protected(0, 0), Protected(1, 0)]
    assert find_protected(gm, only(gm, aten.cat.default), 1) == Protected(1, 0)


class Words(nn.Module):
    """Two layers over words, and what the head reads of them."""

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + F.scaled_dot_product_attention(x, x, x)
        return self.head(x)


@pytest.mark.parametrize(
    ("head", "wanted"),
    [
        (lambda x: x[:, 0], Protected(1, 0)),
        (lambda x: x[:, -1].tanh(), Protected(0, 1)),
        (lambda x: x.transpose(0, 1)[0] + x[:, 1], Protected(2, 0)),
        (lambda x: x[:, 2], Protected(0, 0)),  # in the middle it is put back
        (lambda x: x, Protected(0, 0)),
        (lambda x: x.mean(1), Protected(0, 0)),
        (lambda x: x[:, 0] + x[:, 1] + x[:, 2] + x[:, 3], Protected(0, 0)),  # most of them
    ],
)
def test_words_that_the_head_picks(head: Callable[[Tensor], Tensor], wanted: Protected) -> None:
    gm = graph_of(Words(head))
    stream = next(iter(find_branches(gm))).add
    assert with_picked(gm, stream, find_protected(gm, stream, 1)) == wanted
