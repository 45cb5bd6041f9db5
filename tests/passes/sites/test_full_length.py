"""Products with a table per row, column or token: each token left is in its place while they run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from blocks import Block
from graphs import C, N, graph_of, leave_at_input, on_short_input, prepared, rows, sample, table
from torch import Tensor, nn

from passes.axes.gather import in_place
from passes.axes.rules.full_length import FullLength
from passes.graph.layout import Batch, Free, Prunable, Tokens, expr, on_grid
from passes.pipeline import prune
from passes.sites.full_length import WriteFullLength
from passes.sites.retarget import RetargetTokens
from passes.sites.steps import Prune

ROWS, COLUMNS = 2, 3
HIGH, WIDE = table(ROWS, 5, C, seed=2), table(COLUMNS, 5, C, seed=3)


def grid(x: Tensor) -> Tensor:
    return x.unflatten(1, (ROWS, COLUMNS))


def product(equation: str) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.einsum(equation, grid(x), HIGH if "h" in equation.split(",")[1][:3] else WIDE)


def in_heads(x: Tensor, equation: str, side: Tensor) -> Tensor:
    """Heads are folded into the samples, as [B·2, N, 4]; the result has them by themselves again."""
    folded = x.unflatten(-1, (2, -1)).transpose(1, 2).flatten(0, 1)
    return torch.einsum(equation, grid(folded), side).unflatten(0, (-1, 2)).flatten(2, 3).transpose(1, 2)


CARRIES: dict[str, Callable[[Tensor], Tensor]] = {  # each gives [B, N, ...]
    "rows": lambda x: product("bhwc,hkc->bhwk")(x).flatten(1, 2),
    "columns": lambda x: product("bhwc,wkc->bhwk")(x).flatten(1, 2),
    "both at once": lambda x: torch.einsum("bhwc,hkc,wkc->bhwk", grid(x), HIGH, WIDE).flatten(1, 2),
    "columns first": lambda x: product("bhwc,wkc->bwhk")(x).transpose(1, 2).flatten(1, 2),
    "apart": lambda x: product("bhwc,hkc->whbk")(x).permute(2, 1, 0, 3).flatten(1, 2),
    "rows in heads": partial(in_heads, equation="bhwc,hkc->bhwk", side=table(ROWS, 5, 4)),
    "columns in heads": partial(in_heads, equation="bhwc,wkc->bhwk", side=table(COLUMNS, 5, 4)),
    "a matrix a token": lambda x: (x.transpose(0, 1) @ table(N, C, 5)).transpose(0, 1),
    "a matrix a token, and more": lambda x: torch.baddbmm(
        table(N, 1, 5), x.transpose(0, 1), table(N, C, 5)
    ).transpose(0, 1),
    "a matrix a row": lambda x: (grid(x).transpose(0, 1) @ table(ROWS, 1, C, 5)).transpose(0, 1).flatten(1, 2),
}  # fmt: skip


@pytest.mark.parametrize("f", CARRIES.values(), ids=CARRIES)
def test_each_token_meets_the_entry_of_its_place(f: Callable[[Tensor], Tensor]) -> None:
    x = sample()
    (short,), index = on_short_input(graph_of(f), x)
    torch.testing.assert_close(short, rows(f(x), index))


def test_the_op_runs_once_as_the_model_wrote_it() -> None:
    gm = graph_of(product("bhwc,hkc->bhwk"))
    leave_at_input(gm, 4)
    gm = RetargetTokens()(gm).gm
    (found,) = [n for n in gm.graph.nodes if isinstance(n.target, FullLength)]
    assert found.target.op is torch.ops.aten.einsum.default
    gm = WriteFullLength()(gm).gm
    assert not [n for n in gm.graph.nodes if isinstance(n.target, FullLength)]
    assert WriteFullLength()(gm).rewrites == 0


def test_in_place_takes_tokens_in_any_order() -> None:
    high, wide = on_grid(Tokens((Prunable(N),)), ROWS, COLUMNS)
    layout = (high, (Batch(expr(2)),), wide, (Free(expr(4)),))
    index = torch.tensor([[5, 0, 3], [1, 4, 2]])
    short = table(3, 2, 1, 4)
    full = in_place(short, layout, index)
    assert full.shape == (ROWS, 2, COLUMNS, 4)
    for b in range(2):
        for i, at in enumerate(index[b].tolist()):
            assert torch.equal(full[at // COLUMNS, b, at % COLUMNS], short[i, b, 0])


class Gated(nn.Module):
    """Blocks whose attention reads gated tokens; the gate is a table of rows times the token."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.place = nn.Parameter(table(N, C))
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.high = nn.Parameter(table(ROWS, C, C))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5 + self.place
        for block in self.blocks:
            y = block.norm1(x)
            gate = torch.einsum("bhwc,hkc->bhwk", grid(y), self.high).flatten(1, 2)
            x = x + block.attn(y * gate.sigmoid())
            x = x + block.mlp(block.norm2(x))
        return x.mean(1)


@torch.no_grad()
def test_later_sites_narrow_the_places() -> None:
    model, x = Gated(4).eval(), sample()
    keep = [5, 4, 2]
    compiled = prune(prepared(model), [Prune(i, partial(lambda kept, _: kept, k)) for i, k in enumerate(keep)])
    assert not [n for n in compiled.gm.graph.nodes if isinstance(n.target, FullLength)]
    wanted = []
    for stream in x * 1.5 + model.place:
        at = torch.arange(N)
        for i, block in enumerate(model.blocks):
            y = block.norm1(stream)
            gate = torch.stack([model.high[t // COLUMNS] @ v for t, v in zip(at.tolist(), y, strict=True)])
            middle = stream + block.attn((y * gate.sigmoid())[None])[0]
            branch = block.mlp(block.norm2(middle))
            stream = middle + branch
            if i < len(keep):
                kept = (branch - middle).norm(dim=-1).topk(keep[i]).indices.sort().values
                at, stream = at[kept], stream[kept]
        wanted.append(stream.mean(0))
    torch.testing.assert_close(compiled.gm(x)[0], torch.stack(wanted))
