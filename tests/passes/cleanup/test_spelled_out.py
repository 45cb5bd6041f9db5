"""Sizes or a dtype in place of the tensor that has them: the same values, and no longer computed from that tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import B, C, N, axis_from_input, graph_of, on_short_input, only, rows, sample, table
from torch import Tensor

from passes.cleanup.canonicalise import Canonicalise
from passes.cleanup.spelled_out import BY_SIZES, spell_out
from passes.graph.base import Refusal

aten = torch.ops.aten
LIKE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[str]]] = {
    "a channel to all": (lambda x, y: y[..., :1].expand_as(x), ["-1", "6", "8"]),
    "a table to samples": (lambda x, y: y[0].expand_as(x), ["sym_size_int", "6", "8"]),
    "a row to samples": (lambda x, y: y[:1, :1].expand_as(x), ["sym_size_int", "6", "8"]),
    "new dimensions": (lambda x, y: y[0, 0].expand_as(x), ["sym_size_int", "6", "8"]),
    "a view": (lambda x, y: y.flatten(1).view_as(x), ["sym_size_int", "6", "8"]),
    "a view that joins": (lambda x, y: y.view_as(x.flatten(1)), ["sym_size_int", "48"]),
    "a reshape": (lambda x, y: y.mT.reshape_as(x), ["sym_size_int", "6", "8"]),
}


@pytest.mark.parametrize("name", LIKE)
def test_the_same_values_and_gradients(name: str) -> None:
    f, sizes = LIKE[name]
    gm = graph_of(lambda x, y: f(x, y) * x.reshape(f(x, y).shape), sample(), sample(seed=1))
    found = [n for n in gm.graph.nodes if n.target in BY_SIZES]
    assert found and spell_out(gm.graph) == len(found)
    assert [str(s) for s in found[0].args[1]] == sizes and found[0].target in BY_SIZES.values()
    assert spell_out(gm.graph) == 0
    gm.graph.lint()
    gm.recompile()
    for batch in (1, 2, 5):
        both = [sample(batch=batch, seed=s).requires_grad_() for s in (0, 1)]
        x, y = both
        wanted = f(x, y) * x.reshape(f(x, y).shape)
        got = gm(*both)[0]
        assert torch.equal(got, wanted) and got.stride() == wanted.stride()
        weights = torch.arange(float(got.numel())).reshape(got.shape)
        for g, w in zip(
            torch.autograd.grad(got, both, weights), torch.autograd.grad(wanted, both, weights), strict=True
        ):
            assert torch.equal(g, w)


def test_a_sequence_of_another_length_keeps_its_own_symbols() -> None:
    gm = graph_of(lambda x, y: y.expand_as(x) + x, sample(), table(1, N, C))
    assert spell_out(gm.graph) == 1
    gm.recompile()
    x, y = sample(batch=4), table(1, N, C)
    assert torch.equal(gm(x, y)[0], y + x)


def test_what_grows_by_nothing_goes() -> None:
    gm = Canonicalise()(graph_of(lambda x: (x * 2).expand_as(x) + (x * 3).view_as(x))).gm
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [aten.mul.Tensor] * 2 + [aten.add.Tensor]


def test_an_alias_is_still_written_to() -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 2
        y[:, :1].expand_as(y)[:, :1].add_(1)
        return y + 0

    gm = Canonicalise()(graph_of(f)).gm
    assert torch.equal(gm(sample())[0], f(sample()))


def scores(x: Tensor, mask: Tensor) -> Tensor:
    """A mask [B, N] by keys on the scores of all pairs, as XLM writes it."""
    pairs = x @ x.mT
    return pairs.masked_fill((mask > 0).view(-1, 1, mask.shape[1]).expand_as(pairs), -1e9)


def test_a_mask_by_keys_is_gathered() -> None:
    mask = sample(channels=1, seed=3)[..., 0]
    with pytest.raises(Refusal, match="only a side input of it carries tokens"):
        axis_from_input(graph_of(scores, sample(), mask))
    gm = graph_of(scores, sample(), mask)
    spell_out(gm.graph)
    (got,), index = on_short_input(gm, sample(), mask)
    full = scores(sample(), mask)
    wanted = rows(rows(full, index), index, tokens=2)
    assert index.shape == (B, 4) and torch.equal(got, wanted) and (got == -1e9).any()


def test_a_class_token_beside_every_other() -> None:
    """As DPT reads it out: the class token, expanded to the others and joined to their channels."""

    def f(x: Tensor) -> Tensor:
        token, others = x[:, 0], x[:, 1:]
        return torch.cat([others, token.unsqueeze(1).expand_as(others)], -1)

    gm = graph_of(f)
    spell_out(gm.graph)
    assert only(gm, aten.expand.default).args[1] == [-1, N - 1, C]
    (got,), index = on_short_input(gm, sample(), prefix=1)
    assert torch.equal(got, rows(f(sample()), index[:, 1:] - 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_type_is_no_use_of_a_value(dtype: torch.dtype) -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 2
        return y.double().softmax(-1).type_as(y)

    gm = graph_of(f, sample().to(dtype))
    found = only(gm, aten.type_as.default)
    y = only(gm, aten.mul.Tensor)
    assert spell_out(gm.graph) == 1 and found.args[1] is dtype and found not in y.users
    gm.recompile()
    got, wanted = gm(sample().to(dtype))[0], f(sample().to(dtype))
    assert torch.equal(got, wanted) and got.dtype is dtype
