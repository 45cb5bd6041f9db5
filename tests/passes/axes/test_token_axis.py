"""The token axis on whole small networks: collisions of sizes, prefixes, side inputs, and what it declines.

Each network is a function f(x, *tables). The reference runs f on one sample at a time,
with the tokens that stay and with tables cut by hand.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphs import (
    axis_from_input,
    first_input,
    graph_of,
    layout_text,
    leaves,
    on_short_input,
    only,
    prepared,
    rows,
    sample,
    table,
)
from torch import Tensor, nn

from passes.axes.token_axis import WAY_OUT, analyse, mixing, sequences_per_sample, stream_layout
from passes.graph.base import Refusal
from passes.graph.layout import Batch, Fixed, Prunable, show, tokens_in
from passes.network.branches import find_branches
from passes.pipeline import prune
from passes.sites.steps import Prune

aten = torch.ops.aten
Network = Callable[..., Tensor]
Cut = Callable[[Tensor, Tensor], Tensor]


def by_token(t: Tensor, i: Tensor) -> Tensor:
    """Of a table [N, ...]."""
    return t[i]


def by_pair(t: Tensor, i: Tensor) -> Tensor:
    """[N, N]."""
    return t[i][:, i]


def by_head_and_pair(t: Tensor, i: Tensor) -> Tensor:
    """[H, N, N]."""
    return t[:, i][:, :, i]


def whole(t: Tensor, i: Tensor) -> Tensor:
    return t


def attention(x: Tensor, mask: Tensor | None = None, heads: int = 2) -> Tensor:
    b, n, c = x.shape
    q, k, v = torch.cat([x, 2 * x, -x], -1).reshape(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(b, n, c)


def block(x: Tensor, up: Tensor, down: Tensor, mask: Tensor | None = None) -> Tensor:
    x = x + attention(F.layer_norm(x, x.shape[-1:]), mask)
    return x + F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:]), up)), down)


def rotated(x: Tensor, cosines: Tensor, prefix: int = 1) -> Tensor:
    """RoPE by slice and cat, only on what stands behind the prefix."""
    patches = x[:, prefix:]
    turned = torch.cat([-patches.chunk(2, -1)[1], patches.chunk(2, -1)[0]], -1)
    return torch.cat([x[:, :prefix], patches * cosines + turned * (1 - cosines)], 1)


def rope_attention(x: Tensor, cosines: Tensor) -> Tensor:
    x = rotated(x, cosines)
    return F.scaled_dot_product_attention(x, x, x)


NETWORKS: dict[str, tuple[Network, tuple[Tensor, ...], tuple[Cut, ...], dict[str, int]]] = {
    # N = C: the channels must not shrink
    "N = C": (block, (table(24, 12), table(12, 24)), (whole, whole), {"tokens": 12, "channels": 12}),
    "N = 3C": (block, (table(8, 4), table(4, 8)), (whole, whole), {"tokens": 12, "channels": 4}),
    "N = hidden width": (block, (table(12, 4), table(4, 12)), (whole, whole), {"tokens": 12, "channels": 4}),
    "N = H": (lambda x: attention(x, heads=4), (), (), {"tokens": 4, "channels": 8}),
    "N = channels of a head": (lambda x: attention(x), (), (), {"tokens": 4, "channels": 8}),
    "[N, N] mask": (attention, (table(6, 6),), (by_pair,), {}),
    "[N, N] mask, N = C": (attention, (table(8, 8),), (by_pair,), {"tokens": 8}),
    "[H, N, N] bias": (attention, (table(2, 6, 6),), (by_head_and_pair,), {}),
    "bias that depends on the tokens": (
        lambda x, t: attention(x, (t * x.mean(-1)[:, :, None])[:, None]),
        (table(6, 6),),
        (by_pair,),
        {},
    ),
    "[N, C] table": (lambda x, t: attention(x + t), (table(6, 8),), (by_token,), {}),
    "[N, C] table, N = C": (lambda x, t: attention(x + t), (table(8, 8),), (by_token,), {"tokens": 8}),
    "a matrix [C, C], N = C": (lambda x, t: attention(x @ t), (table(8, 8),), (whole,), {"tokens": 8}),
    "RoPE behind a prefix": (
        rope_attention,
        (table(5, 8),),
        (lambda t, i: t[i[1:] - 1],),
        {"prefix": 1},
    ),
    "class token that joins late": (
        lambda x, t: attention(torch.cat([t.expand(x.shape[0], -1, -1), attention(x)], 1))[:, 0],
        (table(1, 1, 8),),
        (whole,),
        {},
    ),
    "class attention over patches": (
        lambda x, t: F.scaled_dot_product_attention(t.expand(x.shape[0], -1, -1), x, x),
        (table(1, 1, 8),),
        (whole,),
        {},
    ),
    "suffix tokens": (lambda x: attention(x)[:, -2:], (), (), {"suffix": 2}),
    "prefix and suffix": (
        lambda x: torch.cat([attention(x)[:, :1], attention(x)[:, -1:]], 1),
        (),
        (),
        {"prefix": 1, "suffix": 1},
    ),
    "mean over patches": (lambda x: attention(x)[:, 2:].mean(1), (), (), {"prefix": 2}),
    "folded heads": (
        lambda x, t: (
            (lambda q: (q @ q.mT + t).softmax(-1) @ q)(x.reshape(-1, x.shape[1], 2, 4).transpose(1, 2).flatten(0, 1))
            .reshape(-1, 2, x.shape[1], 4)
            .transpose(1, 2)
            .flatten(2)
        ),
        (table(6, 6),),
        (by_pair,),
        {},
    ),
}


@pytest.mark.parametrize(("network", "tables", "cuts", "sizes"), NETWORKS.values(), ids=NETWORKS)
@torch.no_grad()
def test_short_network(
    network: Network, tables: tuple[Tensor, ...], cuts: tuple[Cut, ...], sizes: dict[str, int]
) -> None:
    x = sample(sizes.get("tokens", 6), sizes.get("channels", 8))
    prefix, suffix = sizes.get("prefix", 0), sizes.get("suffix", 0)
    gm = graph_of(network, x, tables=tables)
    (value,), index = on_short_input(gm, x, keep=x.shape[1] * 2 // 3, prefix=prefix, suffix=suffix)
    for b, own in enumerate(index):
        wanted = network(x[b : b + 1][:, own], *(cut(t, own) for cut, t in zip(cuts, tables, strict=True)))
        torch.testing.assert_close(value[b : b + 1], wanted, msg=f"sample {b}")


@torch.no_grad()
def test_positions_computed_in_the_graph() -> None:
    """A table that is computed from constants is gathered where it meets the tokens, not before."""
    x = sample()

    def network(x: Tensor, places: Tensor) -> Tensor:
        return x + (places[:, None] * torch.ones(8) / 7).cumsum(0).sin()

    places = torch.arange(6.0)
    (value,), index = on_short_input(graph_of(network, x, tables=(places,)), x)
    torch.testing.assert_close(value, rows(network(x, places), index))


@pytest.mark.parametrize("tokens", [6, 8])  # 8 = C
@torch.no_grad()
def test_mask_from_a_second_input(tokens: int) -> None:
    """A mask [B, N, 1] that is an input of the model has each sample's own rows already."""
    x, mask = sample(tokens), (table(3, tokens, 1) > 0).float()
    gm = graph_of(lambda x, m: attention(x * m), x, mask)
    (value,), index = on_short_input(gm, x, mask)
    torch.testing.assert_close(value, attention(rows(x, index) * rows(mask, index)))


@torch.no_grad()
def test_token_first() -> None:
    """[N, B, C]: the samples are dimension 1."""
    gm = graph_of(lambda x: attention(x.transpose(0, 1).relu().transpose(0, 1)).transpose(0, 1))
    stream = only(gm, aten.relu.default)
    layout, batch = stream_layout(stream)
    assert [tokens_in(d) is not None for d in layout] == [True, False, False]
    assert layout[1] == (batch,)
    axis = analyse(gm, stream, layout, batch)
    (leaf,) = leaves(gm)
    assert layout_text(axis, leaf) == "[tokens(6), batch, 8]"


def test_stream_layout() -> None:
    gm = graph_of(lambda x: x * 2)
    (leaf,) = leaves(gm)
    layout, batch = stream_layout(leaf, prefix=1, suffix=2)
    tokens = tokens_in(layout[1])
    assert isinstance(batch, Batch) and layout[0] == (batch,)
    assert tokens is not None and tokens.pieces == (Fixed(1), Prunable(3), Fixed(2))


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda x: x.flatten(0, 1) * 2, "['6*B', '8']"),
        (lambda x: x.reshape(-1, 8, 2, 3, 1) * 2, "['B', '8', '2', '3', '1']"),
        (lambda x: x.permute(1, 2, 0) * 2, "['6', '8', 'B']"),
        (lambda x: x.mean(0, keepdim=True) * 2, "['1', '6', '8']"),
    ],
)
def test_stream_without_a_token_dimension(network: Network, shape: str) -> None:
    gm = graph_of(network)
    symbol = str(first_input(gm).meta["val"].shape[0])
    with pytest.raises(Refusal) as refusal:
        stream_layout(only(gm, aten.mul.Tensor))
    wanted = f"the residual stream is {shape}, not [batch, tokens, channels]"
    assert refusal.value.reason.replace(symbol, "B") == wanted
    assert refusal.value.way_out == (
        "tokens folded into the batch, or of several samples in one sequence cannot be pruned"
    )


@pytest.mark.parametrize(
    ("network", "shown"),
    [
        (lambda x: x.reshape(-1, 3, 8) * 2, "[2*batch, tokens(3), 8]"),
        (lambda x: x.reshape(-1, 3, 8).transpose(0, 1) * 2, "[tokens(3), 2*batch, 8]"),
        (lambda x: x.reshape(-1, 2, 3, 4) * 2, "[2*batch, rows(2), columns(3), 4]"),
    ],
)
def test_several_sequences_a_sample(network: Network, shown: str) -> None:
    stream = only(graph_of(network), aten.mul.Tensor)
    layout, batch = stream_layout(stream)
    assert (show(layout), batch.sequences, sequences_per_sample(stream)) == (shown, 2, 2)


@pytest.mark.parametrize(
    "joining",
    [
        lambda x: x.reshape(-1, 6, 8),
        lambda x: x.unflatten(0, (-1, 2)),
        lambda x: x.reshape(-1, 2, 3, 8).transpose(1, 2),
    ],
)
def test_sequences_of_a_sample_join_when_all_tokens_are_there(joining: Network) -> None:
    gm = graph_of(lambda x: joining(x.reshape(-1, 3, 8) * 2))
    stream = only(gm, aten.mul.Tensor)
    axis = analyse(gm, stream, *stream_layout(stream))
    ((node, reason),) = axis.dense.items()
    assert str(reason).endswith("which splits the token axis, or its 2 sequences a sample")
    assert node in stream.users and list(axis.layouts) == [stream]


def test_mixing_is_the_first_op_between_tokens() -> None:
    gm = graph_of(lambda x: F.scaled_dot_product_attention(x.relu(), x, x).mean(1))
    axis = axis_from_input(gm)
    mixes = mixing(axis, list(axis.transfers))
    assert mixes is only(gm, aten.scaled_dot_product_attention.default)
    assert mixing(axis, [only(gm, aten.relu.default)]) is None
    assert axis.transfers[only(gm, aten.mean.dim)].mixes  # though it comes later


def test_within_records_and_never_follows() -> None:
    gm = graph_of(lambda x: (x.relu().cumsum(1) + 1).sin())
    x = next(iter(gm.graph.nodes))
    layout, batch = stream_layout(x)
    cumsum = only(gm, aten.cumsum.default)
    axis = analyse(gm, x, layout, batch, within=[only(gm, aten.relu.default), cumsum])
    assert {n: str(reason) for n, reason in axis.dense.items()} == {
        cumsum: "an op along a dimension that runs over the token axis"
    }
    assert len(axis.layouts) == 2


class GridBlock(nn.Module):
    """A depthwise 3 x 3 over the grid of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.transpose(1, 2).reshape(-1, 8, 2, 3)
        return self.conv(grid).flatten(2).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class Stages(nn.Module):
    """MLP blocks, with a grid convolution after the first (in the middle) or after the last."""

    def __init__(self, grid_after: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlps = nn.ModuleList([MLP() for _ in range(2)])
        self.grid, self.grid_after = GridBlock(), grid_after

    def forward(self, x: Tensor) -> Tensor:
        for i, mlp in enumerate(self.mlps):
            x = x + mlp(x)
            if i == self.grid_after:
                x = self.grid(x)
        return x


def test_grid_in_the_middle_refuses() -> None:
    """The message names the op, the line of the model it comes from, and a way out."""
    gm = prepared(Stages(grid_after=0))
    with pytest.raises(Refusal) as refusal:
        prune(gm, [Prune(0, lambda n: 4)])
    name, line, way_out = str(refusal.value).splitlines()
    symbol = str(first_input(gm).meta["val"].shape[0])
    assert name.replace(symbol, "B") == (
        f"{refusal.value.op} ({refusal.value.node_name}): a convolution, which needs the tokens on their full grid, "
        "and later layers depend on it; no layer lies between [RSC-403]"
    )
    assert refusal.value.op.startswith("aten.")
    code = GridBlock.forward.__code__
    assert line == (
        f'  in the model: File "{code.co_filename}", line {code.co_firstlineno + 2}, in forward: '
        "return self.conv(grid).flatten(2).transpose(1, 2)"
    )
    assert way_out == f"  way out: {WAY_OUT}"
    assert WAY_OUT == "prune after a later block, or register a rule with rs_compile.register_token_rule"


@torch.no_grad()
def test_grid_at_the_end_is_restored() -> None:
    model, x = Stages(grid_after=1), sample()
    dense = model(x)
    found = prune(prepared(model, x), [Prune(0, lambda n: 4)]).gm(x)[0]
    assert found.shape == dense.shape
    # each token runs through the MLPs by itself: the two that leave keep what block 0 gave them
    streams = [x + model.mlps[0](x)]
    streams.append(streams[0] + model.mlps[1](streams[0]))
    shift = torch.linalg.vector_norm(streams[0] - 2 * x, dim=-1)
    stay = torch.zeros(3, 6, dtype=torch.bool).scatter(1, shift.topk(4).indices, True)
    wanted = model.grid(torch.where(stay[..., None], streams[1], streams[0]))
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, dense, atol=1e-3)


def test_analysis_changes_nothing() -> None:
    gm = prepared(Stages(grid_after=1))
    before = str(gm.graph)
    for branch in find_branches(gm):
        layout, batch = stream_layout(branch.add)
        analyse(gm, branch.add, layout, batch)
    assert str(gm.graph) == before


class OneByOne(nn.Module):
    """Something is added to each sample by itself, which fixes their number; `joined` makes one sequence of all."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined = joined
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([one + i for i, one in enumerate(x.unbind())])
        x = x.reshape(1, -1, 8) if self.joined else x
        x = x + F.scaled_dot_product_attention(x, x, x)
        return x + self.down(F.gelu(self.up(x)))


@torch.no_grad()
def test_a_fixed_number_of_samples() -> None:
    torch.manual_seed(0)
    model, x = OneByOne(joined=False).eval(), sample()
    dense = model(x)
    found = prune(prepared(model, x), [Prune(0, lambda n: 4)], compact_outputs=True).gm(x)
    torch.testing.assert_close(found[0], dense.gather(1, found[1][..., None].expand(-1, -1, 8)))


def test_several_samples_in_one_sequence() -> None:
    gm = prepared(OneByOne(joined=True).eval(), sample())
    with pytest.raises(Refusal) as refusal:
        stream_layout(find_branches(gm)[0].add)
    assert refusal.value.reason == (
        "the residual stream is ['1', '18', '8'], not [batch, tokens, channels], "
        "and the model's code fixes its 3 samples"
    )
    assert refusal.value.way_out == (
        "tokens folded into the batch, or of several samples in one sequence cannot be pruned; "
        "with one sample a call they might"
    )
