"""Unread tokens: held against the model itself in float64, and the MACs saved against what can be counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import graph_of
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from passes.graph.cost import count
from passes.graph.verify import no_stale_shapes
from passes.pipeline import prepare
from passes.sites.drop_unread import DropUnread
from rs_compile.rules import Context, Transfer, register_token_rule, scoped

B, N, C, HEADS, HIDDEN = 3, 12, 8, 2, 20
Read = Callable[[Tensor], Tensor]


def rotated(x: Tensor) -> Tensor:
    """RoPE, in halves, by the position along dimension -2."""
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.linspace(1, 0.1, x.shape[-1] // 2, dtype=x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


class Encoder(nn.Module):
    """One layer in the spelling that is asked for; a subclass says what is read behind it."""

    def __init__(self, read: Read, kind: str = "fused") -> None:
        super().__init__()
        self.read, self.kind = read, kind
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.q, self.k, self.v = (nn.Linear(C, C) for _ in range(3))
        self.up, self.gate, self.down = nn.Linear(C, HIDDEN), nn.Linear(C, HIDDEN), nn.Linear(HIDDEN, C)
        self.both = nn.Linear(C, 2 * HIDDEN)
        self.norm1, self.norm2, self.last = nn.LayerNorm(C), nn.LayerNorm(C), nn.LayerNorm(C)
        self.norm_q, self.norm_k = nn.LayerNorm(C // HEADS), nn.LayerNorm(C // HEADS)
        self.scale = nn.Parameter(torch.rand(C))
        self.bias = nn.Parameter(torch.randn(1, HEADS, N, N))
        self.head = nn.Linear(C, 5)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, _ = x.shape
        if self.kind == "separate":
            return tuple(f(x).view(b, n, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.kind == "by head":  # [q, k, v] of a head stand together
            return self.qkv(x).view(b, n, HEADS, 3, -1).transpose(1, 2).unbind(3)
        if self.kind == "chunks":
            return tuple(y.view(b, n, HEADS, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if self.kind == "folded":  # tokens folded with samples
            y = self.qkv(x.reshape(b * n, C))
            return tuple(y.view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4))
        return self.qkv(x).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.heads(x)
        if self.kind == "qk norm and rope":
            q, k = rotated(self.norm_q(q)), rotated(self.norm_k(k))
        if self.kind == "by hand":
            y = (q @ k.transpose(-2, -1) * 0.5 + self.bias).softmax(-1) @ v
        else:
            mask = self.bias if self.kind == "relative" else mask
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.kind == "causal")
        return self.proj(y.transpose(1, 2).reshape(x.shape))

    def mlp(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.kind == "packed swiglu":
            a, b = self.both(x).chunk(2, -1)
            return self.down(F.silu(a) * b)
        return self.down(F.gelu(self.up(x)))

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.kind == "post-norm":
            x = self.norm1(x + self.attend(x, mask))
            x = self.norm2(x + self.mlp(x))
        elif self.kind == "parallel":
            y = self.norm1(x)
            x = x + self.attend(y, mask) + self.mlp(y)
        else:
            x = x + self.scale * self.attend(self.norm1(x), mask)
            x = x + self.scale * self.mlp(self.norm2(x))
        return self.read(self.last(x))


class Layer(Encoder):
    """The layer, and what `read` takes of it."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.encode(x, mask)


def dropped(model: nn.Module, *inputs: Tensor, lower: bool = False) -> tuple[GraphModule, int, int]:
    """The rewritten graph of a model, held against it; MACs saved; rewrites."""
    model = model.double().eval()
    gm = prepare(model, inputs, {}, lower).gm
    dense = count(gm).macs
    result = DropUnread()(gm)
    no_stale_shapes(result.gm)
    with torch.no_grad():
        got, want = result.gm(*inputs)[0], model(*inputs)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        one = [x[:1] for x in inputs]  # another number of samples
        torch.testing.assert_close(result.gm(*one)[0], model(*one), rtol=1e-12, atol=1e-12)
    return result.gm, dense - count(result.gm).macs, result.rewrites


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def saved_for(read: int, layers: int = 2) -> int:
    """MACs of a block for the tokens that are not read: queries, both products of attention, projection, MLP."""
    return (N - read) * (2 * C * C + 2 * N * C + layers * C * HIDDEN)


def first(x: Tensor) -> Tensor:
    return x[:, 0]


KINDS = ["fused", "separate", "by head", "chunks", "folded", "qk norm and rope", "by hand", "relative", "causal"]


@pytest.mark.parametrize("kind", [*KINDS, "post-norm", "parallel"])
def test_a_class_token_needs_its_own_query_and_mlp_alone(kind: str) -> None:
    gm, saved, rewrites = dropped(Layer(first, kind), tokens())
    assert saved == saved_for(1)
    assert rewrites > 0
    again = DropUnread()(gm)
    assert again.rewrites == 0 or count(again.gm).macs == count(gm).macs


@pytest.mark.parametrize("kind", ["swiglu", "packed swiglu"])
def test_gated_mlps(kind: str) -> None:
    assert dropped(Layer(first, kind), tokens())[1] == saved_for(1, layers=3)


@pytest.mark.parametrize(
    ("read", "count"),
    [
        (lambda x: x[:, -1], 1),
        (lambda x: x[:, 3:4].flatten(1), 1),
        (lambda x: (x[:, 0] + x[:, 1]) / 2, 2),
        (lambda x: x[:, 0] - x[:, 5] * x[:, 9], 3),
        (lambda x: x[:, :4].mean(1), 4),
        (lambda x: x[:, ::4].amax(1), 3),
        (lambda x: x.split([2, N - 2], 1)[0].flatten(1), 2),
        (lambda x: x.unbind(1)[7], 1),
        (lambda x: x.narrow(1, 2, 2).transpose(0, 1)[0], 2),
        (lambda x: x.transpose(1, 2)[..., 2], 1),
    ],
)
def test_whichever_positions_are_read(read: Read, count: int) -> None:
    assert dropped(Layer(read), tokens())[1] == saved_for(count)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.mean(1),
        lambda x: x[:, 1:].mean(1),
        lambda x: x,
        lambda x: x.flip(1)[:, 0],
        lambda x: x.cumsum(1)[:, -1],
        lambda x: x.softmax(1)[:, 0],
        lambda x: torch.cat((x.amax(1), x[:, 0]), -1),
        lambda x: x[:, : N // 2 + 1].flatten(1),
    ],
)
def test_what_depends_on_more_than_half_of_the_tokens_is_left_alone(read: Read) -> None:
    model = Layer(read).double().eval()
    gm = prepare(model, (tokens(),), {}, False).gm
    code = gm.code
    assert DropUnread()(gm).rewrites == 0
    assert gm.code == code


class TwoOutputs(Encoder):
    """Returns the class token and all tokens."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.encode(x, mask)
        return y[:, 0], y


def test_tokens_among_the_outputs_are_all_computed() -> None:
    gm = prepare(TwoOutputs(lambda x: x).double().eval(), (tokens(),), {}, False).gm
    assert DropUnread()(gm).rewrites == 0


class EndOfText(Encoder):
    """CLIP's text tower: the token at each sample's own position, found from another input."""

    def __init__(self, kind: str = "causal", find: str = "argmax") -> None:
        super().__init__(lambda x: x, kind)
        self.find = find

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = self.encode(x)
        at = ids.argmax(-1)
        if self.find == "gather":
            at = x[..., 0].argmax(1)  # as many as samples; of another input gather would take fewer
            return y.gather(1, at[:, None, None].expand(-1, -1, C)).squeeze(1)
        if self.find == "from the end":
            at = at - N
        rows = torch.arange(y.shape[0], device=y.device)
        return self.head(y[rows + 1 - 1 if self.find == "computed rows" else rows, at])


@pytest.mark.parametrize("kind", ["causal", "fused", "relative", "qk norm and rope", "by hand", "folded"])
@pytest.mark.parametrize("find", ["argmax", "gather", "from the end"])
def test_each_samples_own_position(kind: str, find: str) -> None:
    ids = torch.tensor([[0] * 7 + [9] + [0] * 4, [9] + [0] * 11, [0] * 11 + [9]])
    assert dropped(EndOfText(kind, find), tokens(), ids)[1] == saved_for(1)


def test_rows_that_are_not_the_samples_in_order_are_left_alone() -> None:
    ids = torch.tensor([[0] * 7 + [9] + [0] * 4] * B)
    assert dropped(EndOfText(find="computed rows"), tokens(), ids)[1] == 0


@pytest.mark.parametrize("shape", [(B, 1, N, N), (B, 1, 1, N), (B, HEADS, N, N)])
@pytest.mark.parametrize("read", [first, lambda x: x[:, 4:7].flatten(1)])
def test_a_mask_has_its_rows_picked(shape: tuple[int, ...], read: Read) -> None:
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert dropped(Layer(read), tokens(), mask)[1] == saved_for(1 if read is first else 3)


def test_a_mask_for_each_samples_own_position() -> None:
    class Masked(Encoder):
        def forward(self, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            y = self.encode(x, mask)
            return y[torch.arange(y.shape[0]), ids.argmax(-1)]

    mask = torch.randn(B, 1, N, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids = torch.tensor([[0] * 7 + [9] + [0] * 4, [9] + [0] * 11, [0] * 11 + [9]])
    assert dropped(Masked(lambda y: y), tokens(), ids, mask)[1] == saved_for(1)


class Stack(nn.Module):
    """Two layers: in the first every token is a key of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(lambda x: x), Layer(first))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def test_only_the_last_block_is_short() -> None:
    assert dropped(Stack(), tokens())[1] == saved_for(1)


class Tapped(Stack):
    """Reads the class token after both layers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[0](x)
        return torch.cat((y[:, 0], self.layers[1](y)), -1)


def test_a_value_that_is_read_whole_elsewhere_stays_whole() -> None:
    assert dropped(Tapped(), tokens())[1] == saved_for(1)


class Dropout(Layer):
    """Dropout behind the MLP, that draws a number for every token."""

    def mlp(self, x: Tensor) -> Tensor:
        return F.dropout(super().mlp(x), 0.5, self.training)


def test_random_numbers_are_drawn_for_every_token_as_before() -> None:
    model, x = Dropout(first).double().train(), tokens()
    gm = prepare(model, (x,), {}, False).gm
    saved = count(gm).macs
    result = DropUnread()(gm)
    assert count(result.gm).macs == saved  # all with MACs lies above the dropout
    torch.manual_seed(5)
    got = result.gm(x)[0]
    torch.manual_seed(5)
    torch.testing.assert_close(got, model(x), rtol=1e-12, atol=1e-12)


class Writes(Layer):
    """Writes into the stream after the class token was taken as a view."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        token = y[:, 0]
        y[:, 0] = y[:, 0] * 2
        return token + y[:, 0]


def test_a_graph_that_writes_in_place_is_left_alone() -> None:
    assert dropped(Writes(lambda x: x), tokens())[1:] == (0, 0)


def test_gradients_are_the_models_own() -> None:
    model, x = Layer(first, "qk norm and rope").double(), tokens()
    gm = DropUnread()(prepare(model, (x,), {}, False).gm).gm
    weights = [p for p in model.parameters()]
    want = torch.autograd.grad(model(x).square().sum(), weights, allow_unused=True)
    got = torch.autograd.grad(gm(x)[0].square().sum(), weights, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_table_that_is_the_same_for_all_samples_is_picked_from_for_each() -> None:
    class Placed(EndOfText):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            y = self.encode(x) + self.bias[:, 0, :, :C].tanh().expand(x.shape[0], -1, -1)
            return y[torch.arange(y.shape[0]), ids.argmax(-1)]

    ids = torch.tensor([[0] * 7 + [9] + [0] * 4, [9] + [0] * 11, [0] * 11 + [9]])
    assert dropped(Placed("fused"), tokens(), ids)[1] == saved_for(1)


def test_samples_that_meet_before_each_picks_its_own_token() -> None:
    class Crossed(EndOfText):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            y = self.encode(x).flip(0)
            return y[torch.arange(y.shape[0]), ids.argmax(-1)]

    ids = torch.tensor([[0] * 7 + [9] + [0] * 4, [9] + [0] * 11, [0] * 11 + [9]])
    assert dropped(Crossed("fused"), tokens(), ids)[1] == 0


def test_a_rule_that_promises_another_shape_leaves_the_graph_as_it_was() -> None:
    def wrong(node: Node, ctx: Context) -> Transfer:
        return Transfer(ctx.layout(node.args[0]), target=torch.ops.aten.slice.Tensor, args=(node.args[0], -1, 0, 2))

    gm = graph_of(lambda x: torch.erfinv(F.linear(x.cumsum(1), torch.ones(8, 8)))[:, 0])
    before = str(gm.graph)
    with scoped():
        register_token_rule(torch.ops.aten.erfinv.default, wrong)
        result = DropUnread().apply(gm)
    (skip,) = result.skips
    assert result.rewrites == 0 and "on the positions that are read, not" in skip.reason
    assert str(result.gm.graph) == before
