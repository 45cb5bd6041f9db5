"""Tokens on a grid [B, H, W, C]: those left are as many rows of one column, and each has what it had."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from blocks import Attention, Block
from graphs import B, graph_of, on_short_input, prepared, rows, sample, table
from torch import Tensor, nn

from passes.graph.base import Refusal
from passes.network.branches import find_blocks, find_branches
from passes.network.prunable import prunable
from passes.pipeline import prune
from passes.sites.steps import Merge, Prune
from rs_compile import Stream, explain

ROWS, COLUMNS = 2, 3


def grid(x: Tensor) -> Tensor:
    return x.unflatten(1, (ROWS, COLUMNS))


def heads(x: Tensor) -> Tensor:
    """Attention of two heads whose result lies on a grid at once."""
    q = x.reshape(-1, 6, 2, 4).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, q, q)
    return y.unflatten(2, (ROWS, COLUMNS)).permute(0, 2, 3, 1, 4).reshape(-1, ROWS, COLUMNS, 8)


TABLES = {
    "both": table(ROWS, COLUMNS, 8),
    "rows": table(ROWS, 1, 8),
    "columns": table(COLUMNS, 8),
    "channels": table(8),
}
CARRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "a view": grid,
    "a norm": lambda x: F.layer_norm(grid(x), [8]),
    "a linear layer": lambda x: F.linear(grid(x), table(8, 8)),
    "a product": lambda x: grid(x) @ table(8, 8),
    "an einsum": lambda x: torch.einsum("bhwc,cd->bhwd", grid(x), table(8, 8)),
    **{f"a table of {name}": partial(lambda x, t: grid(x) * t, t=t) for name, t in TABLES.items()},
    "a table of channels first": lambda x: (grid(x).permute(0, 3, 1, 2) + table(8, ROWS, COLUMNS)).permute(0, 2, 3, 1),
    "channels between": lambda x: (grid(x).transpose(2, 3) + table(ROWS, 8, COLUMNS)).transpose(2, 3),
    "another grid and back": lambda x: grid(grid(x).reshape(-1, 3, 2, 8).sin().flatten(1, 2)),
    "folded with samples": lambda x: grid(x).flatten(0, 1).relu().unflatten(0, (-1, ROWS)),
    "one a sample": lambda x: grid(x) + grid(x.cos()),
}


@pytest.mark.parametrize("f", CARRIES.values(), ids=CARRIES)
def test_carries(f: Callable[[Tensor], Tensor]) -> None:
    x = sample()
    (short,), index = on_short_input(graph_of(f), x)
    assert short.shape == (B, 4, 1, 8)
    torch.testing.assert_close(short.squeeze(2), rows(f(x).flatten(1, 2), index))


@torch.no_grad()
def test_attention_that_ends_on_a_grid() -> None:
    x = sample()
    (short,), index = on_short_input(graph_of(heads), x)
    q = rows(x, index).unflatten(-1, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(short.squeeze(2), F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))


def test_over_rows_and_columns() -> None:
    x = sample()
    (mean, most), index = on_short_input(graph_of(lambda x: (grid(x).mean((1, 2)), grid(x).amax((1, 2)))), x)
    torch.testing.assert_close(mean, rows(x, index).mean(1))
    torch.testing.assert_close(most, rows(x, index).amax(1))


class GridBlock(Block):
    """A block on [B, H, W, C]: attention over all tokens, or in each row by itself."""

    def __init__(self, row: bool) -> None:
        super().__init__()
        self.row = row

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).flatten(0, 1) if self.row else self.norm1(x).flatten(1, 2)
        x = x + self.attn(y).reshape(-1, ROWS, COLUMNS, 8)
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    """Blocks with attention over all tokens ("g") and in each row ("r") on a grid."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.place = nn.Parameter(table(ROWS, COLUMNS, 8))
        self.blocks = nn.ModuleList([GridBlock(kind == "r") for kind in kinds])

    def forward(self, x: Tensor) -> Tensor:
        x = grid(x) * 1.5 + self.place
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)


def by_hand(model: Net, x: Tensor, keep: dict[int, int]) -> Tensor:
    """For one sample [N, C] what the model returns."""
    whole, index = x * 1.5 + model.place.flatten(0, 1), torch.arange(6)
    stream = whole
    for i, block in enumerate(model.blocks):
        assert isinstance(block, GridBlock) and isinstance(block.attn, Attention)
        if block.row:
            stream, index = whole, torch.arange(6)
        y = block.norm1(stream)
        y = torch.cat([block.attn(part[None])[0] for part in (y.split(COLUMNS) if block.row else [y])])
        middle = stream + y
        branch = block.mlp(block.norm2(middle))
        stream = middle + branch
        whole = whole.index_copy(0, index, stream)
        if i in keep:
            stay = torch.linalg.vector_norm(branch - middle, dim=-1).topk(keep[i]).indices.sort().values
            stream, index = stream[stay], index[stay]
    return whole.unflatten(0, (ROWS, COLUMNS)).permute(2, 0, 1)


def sites(keep: dict[int, int]) -> list[Prune]:
    return [Prune(i, partial(lambda kept, _: kept, k)) for i, k in keep.items()]


@pytest.mark.parametrize(
    ("kinds", "keep"),
    [("ggg", {0: 4}), ("gggg", {0: 4, 1: 3, 2: 1}), ("rgrg", {0: 4, 2: 5}), ("ggrgg", {0: 3, 2: 4, 3: 2})],
    ids=str,
)
@torch.no_grad()
def test_sites_on_a_grid(kinds: str, keep: dict[int, int]) -> None:
    model, x = Net(kinds).eval(), sample()
    compiled = prune(prepared(model), sites(keep))
    found = compiled.gm(x)[0]
    for b in range(B):
        torch.testing.assert_close(found[b], by_hand(model, x[b], keep))
    assert compiled.blocks[0].tokens_in == 6 and compiled.blocks[0].tokens_out == keep[0]
    assert compiled.blocks[1].macs < compiled.blocks[1].macs_dense


@torch.no_grad()
def test_insertion_alone_is_bit_equal() -> None:
    model, x = Net("gg").eval(), sample()
    found = prune(prepared(model), [Prune(0, lambda n: n, force=True)]).gm(x)[0]
    torch.testing.assert_close(found, model(x))


@torch.no_grad()
def test_merged_on_a_grid() -> None:
    """Each copy comes back with its destination's value, and a second merge counts what the first one did."""
    model, x = Net("ggg").eval(), sample()
    first, second = Merge(0, lambda n: 2, Stream(restore="copy")), Merge(1, lambda n: 1, Stream(restore="copy"))
    one = prune(prepared(model), [first]).gm(x)[0]
    two = prune(prepared(model), [first, second]).gm(x)[0]
    for found, left in ((one, 4), (two, 3)):
        assert found.shape == (B, 8, ROWS, COLUMNS)
        assert all(len(one.flatten(1).T.unique(dim=0)) == left for one in found)


@torch.no_grad()
def test_merged_on_a_grid_behind_the_last_block() -> None:
    """Each token comes back as it was: nothing changed since."""
    model, x = Net("gg").eval(), sample()
    torch.testing.assert_close(prune(prepared(model), [Merge(1, lambda n: 2)]).gm(x)[0], model(x))


def test_the_last_global_block_before_rows_keeps_its_tokens() -> None:
    gm = prepared(Net("ggrg").eval())
    blocks, branches = find_blocks(gm), find_branches(gm)
    answers = [prunable(gm, b, branches) for b in blocks]
    assert [a.able for a in answers] == [True, False, True, True]
    assert answers[0].until == (blocks[1].output,)
    assert "attends to rows or columns of the tokens' grid alone" in answers[1].reason


def test_explained_on_a_grid() -> None:
    rows = explain(Net("ggrg").eval(), sample()).rows
    assert [row.tokens for row in rows] == [6] * 4
    assert [row.until for row in rows] == ["the end of block 1", "", "", ""]


def test_no_short_output_on_a_grid() -> None:
    with pytest.raises(Refusal) as refusal:
        prune(prepared(Net("gg").eval()), sites({0: 4}), compact_outputs=True)
    assert refusal.value.reason == "an output has its tokens on a grid, and those left have none"


def test_gradients() -> None:
    model, x = Net("ggr").eval(), sample()
    prune(prepared(model), sites({0: 3})).gm(x)[0].square().sum().backward()
    used = [p for name, p in model.named_parameters() if "mlp.down" in name or name == "place"]
    assert len(used) == 7 and all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in used)
