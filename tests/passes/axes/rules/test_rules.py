"""The transfer rules: what each op does to the token axis of x [B, N, C] = [3, 6, 8].

For every op that carries the axis the rewritten op runs on a short x, and is held against two other ways: the
dense result with tokens taken out of it afterwards, and the function itself on the short x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import (
    C,
    N,
    axis_from_input,
    graph_of,
    layout_text,
    leaves,
    on_short_input,
    rows,
    sample,
    table,
)
from torch import Tensor

KEEP = 4
WEIGHT = table(C, C)
STREAM = "[batch, tokens(6), 8]"
Op = Callable[..., Any]


@dataclass(frozen=True)
class Carries:
    """An op that carries the axis on.

    Args:
        op: the function of x and of the tables.
        layout: of its result.
        per_token: where (samples, tokens) stand in the result, if each token's result is its own.
        short: it may be called on a short x, as no number of tokens stands in it.
        tables: further arguments, parameters of the module.
        prefix: so many tokens stay.
    """

    op: Op
    layout: str
    per_token: tuple[int, int] | None = (0, 1)
    short: bool = True
    tables: tuple[Tensor, ...] = ()
    prefix: int = 0


def mha(x: Tensor, heads: int = 2) -> Tensor:
    b, n, c = x.shape
    q = x.reshape(b, n, heads, c // heads).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q * 2, q + 1).transpose(1, 2).reshape(b, n, c)


def by_hand(x: Tensor) -> Tensor:
    return (x @ x.transpose(1, 2)).softmax(-1) @ x


POINTWISE = {
    "relu": Carries(lambda x: x.relu(), STREAM),
    "gelu": Carries(F.gelu, STREAM),
    "prelu": Carries(lambda x: F.prelu(x, torch.full((1,), 0.25)), STREAM),
    "prelu of channels": Carries(lambda x: F.prelu(x.mT, torch.arange(8.0)).mT, STREAM),
    "with numbers": Carries(lambda x: (x * 2 + 1) / 3, STREAM),
    "clamp": Carries(lambda x: x.clamp(-1, 1), STREAM),
    "where": Carries(lambda x: torch.where(x > 0, x, 0.1 * x), STREAM),
    "masked_fill": Carries(lambda x: x.masked_fill(x > 1, 0.0), STREAM),
    "nan_to_num": Carries(torch.nan_to_num, STREAM),
    "cast": Carries(lambda x: x.double(), STREAM),
    "type_as": Carries(lambda x, t: x.type_as(t), STREAM, tables=(table(N, N).double(),)),
    "clone": Carries(lambda x: x.clone(), STREAM),
    "contiguous": Carries(lambda x: x.transpose(1, 2).contiguous(), "[batch, 8, tokens(6)]", (0, 2)),
    "dropout in eval": Carries(lambda x: F.dropout(x, 0.5, False), STREAM),
    "zeros_like": Carries(lambda x: torch.zeros_like(x) + 1, STREAM),
    "two values": Carries(lambda x: x.sin() * x.cos(), STREAM),
    "channel vector": Carries(lambda x, t: x * t, STREAM, tables=(table(C),)),
    "position table [N, C]": Carries(lambda x, t: x + t, STREAM, short=False, tables=(table(N, C),)),
    "position table [1, N, 1]": Carries(lambda x, t: x + t, STREAM, short=False, tables=(table(1, N, 1),)),
    "table [C, N]": Carries(lambda x, t: x.transpose(1, 2) * t, "[batch, 8, tokens(6)]", (0, 2), False, (table(C, N),)),
    "class token to all": Carries(lambda x: x + x[:, :1], STREAM, prefix=1),
    "outer sum": Carries(lambda x: x[:, :, None] + x[:, None], "[batch, tokens(6), tokens(6), 8]", None),
}
PRODUCTS = {
    "linear": Carries(lambda x, w: F.linear(x, w[:5]), "[batch, tokens(6), 5]", tables=(WEIGHT,)),
    "matmul with a matrix": Carries(lambda x, w: x @ w, STREAM, tables=(WEIGHT,)),
    "bmm": Carries(lambda x, w: torch.bmm(x, w.expand(x.shape[0], -1, -1)), STREAM, tables=(WEIGHT,)),
    "addmm": Carries(
        lambda x, w: torch.addmm(w[0], x.flatten(0, 1), w), "[batch*tokens(6), 8]", None, tables=(WEIGHT,)
    ),
    "einsum": Carries(
        lambda x, w: torch.einsum("b n c, d c -> b d n", x, w),
        "[batch, 8, tokens(6)]",
        (0, 2),
        tables=(WEIGHT,),
    ),
    "conv1d of one": Carries(
        lambda x, w: F.conv1d(x.transpose(1, 2), w[..., None]),
        "[batch, 8, tokens(6)]",
        (0, 2),
        tables=(WEIGHT,),
    ),
    "logits": Carries(lambda x: x @ x.transpose(1, 2), "[batch, tokens(6), tokens(6)]", None),
    "attention weights": Carries(lambda x: (x @ x.mT).softmax(-1), "[batch, tokens(6), tokens(6)] weights", None),
    "attention by hand": Carries(by_hand, STREAM, None),
    "attention, weights first": Carries(
        lambda x: torch.einsum("bij,bjc->bic", torch.einsum("bic,bjc->bij", x, x).softmax(2), x), STREAM, None
    ),
    "attention over queries": Carries(lambda x: (x @ x.mT).softmax(1).mT @ x, STREAM, None),
    "baddbmm": Carries(
        lambda x, t: torch.baddbmm(t.expand(x.shape[0], -1, -1), x, x.mT).softmax(-1) @ x,
        STREAM,
        None,
        False,
        (table(1, N, N),),
    ),
    "attention": Carries(mha, STREAM, None),
    "attention with a mask": Carries(
        lambda x, t: F.scaled_dot_product_attention(x, x, x, t), STREAM, None, False, (table(N, N),)
    ),
    "causal attention": Carries(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), STREAM, None),
    "queries from a table": Carries(
        lambda x, t: F.scaled_dot_product_attention(t.expand(x.shape[0], -1, -1), x, x),
        "none",
        None,
        tables=(table(2, C),),
    ),
    "keys from a table": Carries(
        lambda x, t: F.scaled_dot_product_attention(x, t.expand(x.shape[0], -1, -1), t.expand(x.shape[0], -1, -1)),
        STREAM,
        tables=(table(5, C),),
    ),
    "class queries": Carries(lambda x: F.scaled_dot_product_attention(x[:, :1], x, x), "none", None, prefix=1),
    "attention pooling": Carries(lambda x: (x[..., :1].softmax(1) * x).sum(1), "none", None),
    "difference of two attentions": Carries(
        lambda x: ((x @ x.mT).softmax(-1) - 0.3 * (x @ -x.mT).softmax(-1)) @ x, STREAM, None
    ),
    "masked and cast weights": Carries(
        lambda x: (
            F.dropout((x @ x.mT).softmax(-1).double().masked_fill(x[..., :1] > 1, 0.0), 0.5, False).to(x.dtype) @ x
        ),
        STREAM,
        None,
    ),
    "renormalised weights": Carries(
        lambda x: ((w := (x @ x.mT).softmax(-1)) / w.sum(-1, keepdim=True)) @ x, STREAM, None
    ),
}
REDUCTIONS = {
    "layer_norm": Carries(lambda x, t: F.layer_norm(x, [C], t), STREAM, tables=(table(C),)),
    "rms_norm": Carries(lambda x: F.rms_norm(x, [C]), STREAM),
    "batch_norm": Carries(
        lambda x, m, v: F.batch_norm(x.transpose(1, 2), m.detach(), v.detach()),
        "[batch, 8, tokens(6)]",
        (0, 2),
        tables=(table(C), table(C) ** 2),
    ),
    "mean over channels": Carries(lambda x: x.mean(-1), "[batch, tokens(6)]"),
    "keepdim": Carries(lambda x: x - x.mean(2, keepdim=True), STREAM),
    "norm over channels": Carries(lambda x: torch.linalg.vector_norm(x, dim=-1), "[batch, tokens(6)]"),
    "var": Carries(lambda x: x.var(-1), "[batch, tokens(6)]"),
    "maximum": Carries(lambda x: x.max(-1).values, "[batch, tokens(6)]"),
    "argmax": Carries(lambda x: x.argmax(-1), "[batch, tokens(6)]"),
    "softmax over channels": Carries(lambda x: x.softmax(-1), STREAM),
    "log_softmax": Carries(lambda x: F.log_softmax(x, -1), STREAM),
    "cumsum": Carries(lambda x: x.cumsum(-1), STREAM),
    "glu": Carries(lambda x: F.glu(x), "[batch, tokens(6), 4]"),
    "mean over tokens": Carries(lambda x: x.mean(1), "none", None),
    "mean over tokens, keepdim": Carries(lambda x: x + x.mean(1, keepdim=True), STREAM, None),
    "maximum over tokens": Carries(lambda x: x.amax(1), "none", None),
    "mean over tokens and channels": Carries(lambda x: x.mean((1, 2)), "none", None),
    "pool": Carries(lambda x: F.adaptive_avg_pool1d(x.transpose(1, 2), 1), "none", None),
    "pool of channels": Carries(lambda x: F.adaptive_avg_pool1d(x, 2), "[batch, tokens(6), 2]"),
}
TOKENS = {
    "class select": Carries(lambda x: x[:, 0], "none", None, prefix=1),
    "last prefix token": Carries(lambda x: x[:, 1], "none", None, prefix=2),
    "prefix": Carries(lambda x: x[:, :2], "none", None, prefix=2),
    "patches": Carries(lambda x: x[:, 2:] * 2, "[batch, tokens(4), 8]", None, prefix=2),
    "part of the prefix": Carries(lambda x: x[:, 1:], "[batch, tokens(5), 8]", None, prefix=2),
    "narrow": Carries(lambda x: x.narrow(1, 0, 1), "none", None, prefix=1),
    "channels": Carries(lambda x: x[..., 2:7:2], "[batch, tokens(6), 3]"),
    "one channel": Carries(lambda x: x[..., 3], "[batch, tokens(6)]"),
    "split": Carries(
        lambda x: torch.cat([p * (i + 1) for i, p in enumerate(x.split([1, x.shape[1] - 1], 1))], 1),
        STREAM,
        (0, 1),
        prefix=1,
    ),
    "chunk of channels": Carries(lambda x: torch.cat(x.chunk(2, -1)[::-1], -1), STREAM),
    "class token in front": Carries(
        lambda x, t: torch.cat([t.expand(x.shape[0], -1, -1), x], 1),
        "[batch, tokens(7), 8]",
        None,
        tables=(table(1, 1, C),),
    ),
    "a suffix": Carries(
        lambda x, t: torch.cat([x, t.expand(x.shape[0], -1, -1)], 1)[:, :-2] + 1,
        "[batch, tokens(6), 8]",
        (0, 1),
        False,
        tables=(table(1, 2, C),),
    ),
    "new tokens in front": Carries(
        lambda x: torch.cat([x.new_ones(x.shape[0], 1, C), x], 1), "[batch, tokens(7), 8]", None
    ),
    "a new mask": Carries(lambda x: x * x.new_full((x.shape[0], N, 1), 2.0), STREAM, (0, 1), False),
    "twice the sequence": Carries(lambda x: torch.cat([x, -x], 1), "[batch, tokens(12), 8]", None),
    "the same in two halves": Carries(
        lambda x: (a := torch.cat([x, -x], 1))[:, : x.shape[1]] - a[:, x.shape[1] :], STREAM
    ),
    "an empty stretch joined": Carries(lambda x: torch.cat([x[:, :0], x], 1) + 1, STREAM),
    "an empty vector joined": Carries(lambda x: torch.cat([x.new_ones(0), x, x * 2], -1), "[batch, tokens(6), 16]"),
    "cat of channels": Carries(lambda x: torch.cat([x, x * 2], -1), "[batch, tokens(6), 16]"),
    "cat of channels from a table": Carries(
        lambda x, t: torch.cat([x, t.expand(x.shape[0], -1, -1)], -1),
        "[batch, tokens(6), 10]",
        (0, 1),
        False,
        (table(N, 2),),
    ),
    "stack": Carries(lambda x: torch.stack([x, -x], 1), "[batch, 2, tokens(6), 8]", (0, 2)),
    "stack with a table": Carries(
        lambda x, t: torch.stack([x, t.expand(x.shape[0], -1, -1)], -1),
        "[batch, tokens(6), 8, 2]",
        (0, 1),
        False,
        (table(N, C),),
    ),
    "index of channels": Carries(lambda x: x[..., [0, 2, 2]], "[batch, tokens(6), 3]"),
    "index_select": Carries(lambda x, t: x.index_select(2, t), "[batch, tokens(6), 2]", tables=(torch.tensor([1, 0]),)),
    "entries picked by the token": Carries(lambda x: x.gather(2, (x[..., :3] > 0).long()), "[batch, tokens(6), 3]"),
    "entries picked by position": Carries(
        lambda x, t: x.gather(2, t.expand(x.shape[0], -1, -1)),
        "[batch, tokens(6), 4]",
        (0, 1),
        False,
        (torch.arange(N * 4).reshape(1, N, 4) % C,),
    ),
    "picked from a table": Carries(
        lambda x, t: t.expand(x.shape[0], -1, -1).gather(2, x.abs().long().clamp(max=4)),
        STREAM,
        (0, 1),
        False,
        (table(1, N, 5),),
    ),
    "one-hot by token": Carries(lambda x: torch.zeros_like(x).scatter(2, x.argmax(-1, keepdim=True), 1.0), STREAM),
    "entries written by token": Carries(lambda x: x.scatter(2, (x[..., :3] > 0).long() * 2, x[..., 4:7] * 0), STREAM),
    "written into a table": Carries(
        lambda x, t: t.expand(x.shape[0], -1, -1).scatter(2, x.abs().long().clamp(max=4), 1.0),
        "[batch, tokens(6), 5]",
        (0, 1),
        False,
        (table(1, N, 5),),
    ),
    "distances, by token": Carries(
        lambda x, t: x @ x.mT + x.gather(2, t.expand(x.shape[0], -1, -1)),
        "[batch, tokens(6), tokens(6)]",
        None,
        False,
        ((torch.arange(N)[:, None] - torch.arange(N)).abs(),),
    ),
    "pad of channels": Carries(lambda x: F.pad(x, (1, 2)), "[batch, tokens(6), 11]"),
}
VIEWS = {
    "heads": Carries(lambda x: x.reshape(x.shape[0], x.shape[1], 2, 4), "[batch, tokens(6), 2, 4]"),
    "q, k, v": Carries(
        lambda x: x.view(x.shape[0], x.shape[1], 2, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)[1],
        "[batch, 2, tokens(6), 2]",
        (0, 2),
    ),
    "folded with samples": Carries(lambda x: x.flatten(0, 1), "[batch*tokens(6), 8]", None),
    "and back": Carries(lambda x: (x.flatten(0, 1) * 2).view(x.shape[0], x.shape[1], 8), STREAM),
    "folded with channels": Carries(lambda x: x.flatten(1), "[batch, tokens(6)*8]", None),
    "unflatten": Carries(lambda x: x.flatten(1).unflatten(1, (x.shape[1], 8)), STREAM),
    "transpose": Carries(lambda x: x.transpose(0, 1), "[tokens(6), batch, 8]", (1, 0)),
    "swapaxes": Carries(lambda x: x.swapaxes(-1, -2), "[batch, 8, tokens(6)]", (0, 2)),
    "mT": Carries(lambda x: x.mT, "[batch, 8, tokens(6)]", (0, 2)),
    "movedim": Carries(lambda x: x.movedim(-1, 0), "[8, batch, tokens(6)]", (1, 2)),
    "movedim of two": Carries(lambda x: x.movedim((0, 2), (2, 1)), "[tokens(6), 8, batch]", (2, 0)),
    "unsqueeze": Carries(lambda x: x[:, None], "[batch, 1, tokens(6), 8]", (0, 2)),
    "squeeze": Carries(lambda x: x[:, :, None].squeeze(2), STREAM),
    "expand": Carries(lambda x: x[:, None].expand(-1, 2, -1, -1), "[batch, 2, tokens(6), 8]", (0, 2)),
    "expand_as": Carries(lambda x: x[..., :1].expand_as(x), STREAM),
    "view_as": Carries(lambda x: x.flatten(1).view_as(x), STREAM),
    "repeat of channels": Carries(lambda x: x.repeat(1, 1, 2), "[batch, tokens(6), 16]"),
    "flip of channels": Carries(lambda x: x.flip(-1), STREAM),
    "roll of channels": Carries(lambda x: x.roll(1, 2), STREAM),
}
CARRIES = {**POINTWISE, **PRODUCTS, **REDUCTIONS, **TOKENS, **VIEWS}


@torch.no_grad()
def all_on_short_input(prefix: int) -> tuple[dict[str, tuple[str, Tensor]], Tensor]:
    """Every op's layout and result on a short x, and the kept positions: one graph, captured once."""
    cases = {name: case for name, case in CARRIES.items() if case.prefix == prefix}
    tables = [t for case in cases.values() for t in case.tables]

    def every_op(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        own = iter(given)
        return tuple(case.op(x, *(next(own) for _ in case.tables)) for case in cases.values())

    gm = graph_of(every_op, tables=tuple(tables))
    axis = axis_from_input(gm, prefix)
    assert not [(n, reason) for n, reason in axis.dense.items() if n.op != "output"]
    layouts = [layout_text(axis, n) if n in axis.layouts else "none" for n in leaves(gm)]
    values, index = on_short_input(gm, sample(), keep=KEEP, prefix=prefix)
    assert index.shape == (3, KEEP) and len({tuple(row) for row in index.tolist()}) > 1  # samples differ
    return dict(zip(cases, zip(layouts, values, strict=True), strict=True)), index


@pytest.fixture(scope="module")
def on_short() -> dict[int, tuple[dict[str, tuple[str, Tensor]], Tensor]]:
    return {prefix: all_on_short_input(prefix) for prefix in (0, 1, 2)}


@pytest.mark.parametrize("name", CARRIES)
@torch.no_grad()
def test_carries(name: str, on_short: dict[int, tuple[dict[str, tuple[str, Tensor]], Tensor]]) -> None:
    case, x = CARRIES[name], sample()
    results, index = on_short[case.prefix]
    layout, value = results[name]
    assert layout == case.layout
    if case.per_token is not None:
        dense = case.op(x, *case.tables)
        torch.testing.assert_close(value, rows(dense, index, *case.per_token))
    if case.short:
        torch.testing.assert_close(value, case.op(rows(x, index), *case.tables))
    assert case.short or case.per_token or case.tables  # compared with something, here or below


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("attention with a mask", lambda x, t, i: (x @ x.T / C**0.5 + t[i][:, i]).softmax(-1) @ x),
        ("baddbmm", lambda x, t, i: (x @ x.T + t[0][i][:, i]).softmax(-1) @ x),
        ("distances, by token", lambda x, t, i: x @ x.T + x.gather(1, t[i][:, i])),
    ],
)
@torch.no_grad()
def test_tables_of_pairs_lose_rows_and_columns(name: str, wanted: Op) -> None:
    case, x = CARRIES[name], sample()
    (value,), index = on_short_input(graph_of(case.op, x, tables=case.tables), x, keep=KEEP)
    for b in range(3):
        torch.testing.assert_close(value[b], wanted(x[b][index[b]], *case.tables, index[b]))


def test_random_numbers_are_drawn_for_the_short_sequence() -> None:
    x = sample()
    gm = graph_of(lambda x: x + torch.rand_like(x))
    (value,), index = on_short_input(gm, x, keep=KEEP)
    noise = value - rows(x, index)
    assert value.shape == (3, KEEP, C) and noise.min() >= 0 and noise.max() <= 1
