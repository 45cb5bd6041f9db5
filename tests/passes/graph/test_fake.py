"""A prime in the batch's place: what ops give is what they give on the symbol."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor

from passes.capture.capture import capture
from passes.graph.fake import Described, LiteralBatch, on_literal_batch
from passes.graph.layout import expr
from passes.graph.splice import fake_mode, splice

aten = torch.ops.aten


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.fixture(scope="module")
def symbolic() -> Any:
    """(mode, fake x [B, 5, 12]) of a captured model."""
    gm = capture(Doubled(), (torch.zeros(3, 5, 12),), {})
    x = next(iter(gm.graph.find_nodes(op="placeholder"))).meta["val"]
    return gm, fake_mode(gm.graph), x


def like(x: FakeTensor, *shape: Any, **kinds: Any) -> FakeTensor:
    with x.fake_mode:
        made: Any = torch.empty(shape, **kinds)
    return made


CASES = {
    "linear": lambda x: (aten.linear.default, (x, like(x, 7, 12), like(x, 7))),
    "layer_norm": lambda x: (aten.layer_norm.default, (x, [12], like(x, 12), like(x, 12))),
    "transpose": lambda x: (aten.transpose.int, (x, 1, 2)),
    "fold tokens into the batch": lambda x: (aten.reshape.default, (x, [x.shape[0] * 5, 12])),
    "heads": lambda x: (aten.reshape.default, (x, [x.shape[0], 5, 3, 4])),
    "attention": lambda x: (
        aten.scaled_dot_product_attention.default,
        tuple(like(x, x.shape[0], 3, 5, 4) for _ in range(3)),
    ),
    "mean over tokens": lambda x: (aten.mean.dim, (x, [1])),
    "unbind": lambda x: (aten.unbind.int, (x, 1)),
    "matmul over tokens": lambda x: (aten.matmul.default, (x, like(x, x.shape[0], 12, 5))),
    "half": lambda x: (aten.to.dtype, (x, torch.float16)),
    "sum of all": lambda x: (aten.sum.default, (x,)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_gives_what_the_symbol_gives(name: str, symbolic: Any) -> None:
    _, mode, x = symbolic
    target, args = CASES[name](x)
    found = on_literal_batch(mode, target, args, {})
    with mode, enable_python_dispatcher(), torch.enable_grad():
        out = target(*args)
    outs, founds = (out, found) if isinstance(out, (list, tuple)) else ([out], [found])
    for true, told in zip(outs, founds, strict=True):
        assert [expr(s) for s in told.shape] == [expr(s) for s in true.shape]
        assert [expr(s) for s in told.stride] == [expr(s) for s in true.stride()]
        assert (told.dtype, told.device) == (true.dtype, true.device)


def test_samples_that_meet_other_rows_are_left_to_the_symbol(symbolic: Any) -> None:
    _, mode, x = symbolic
    assert on_literal_batch(mode, aten.cat.default, ([x, like(x, 1, 5, 12)],), {}) is None  # B + 1


def test_a_second_symbol_is_left_to_the_symbols() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.sum() + y.sum()

    gm = capture(Two(), (torch.zeros(3, 5), torch.zeros(3, 6)), {})
    mode = fake_mode(gm.graph)
    x, y = (n.meta["val"] for n in gm.graph.find_nodes(op="placeholder"))
    if x.shape[0].node.expr == y.shape[0].node.expr:
        pytest.skip("torch made one symbol of both")
    assert LiteralBatch.of(mode, [x, y]) is None


def test_an_error_is_left_to_the_symbol(symbolic: Any) -> None:
    _, mode, x = symbolic
    assert on_literal_batch(mode, aten.linear.default, (x, like(x, 7, 13)), {}) is None


def test_a_size_that_is_larger_tells_nothing(symbolic: Any) -> None:
    _, mode, x = symbolic
    literal = LiteralBatch.of(mode, [x])
    assert literal is not None
    with mode:
        large = torch.empty(1_000_000_008, device="meta")
        fit = torch.empty(2 * 1_000_000_007, 3, device="meta")
    with pytest.raises(ValueError, match="does not tell"):
        literal.described(large)
    assert expr(literal.described(fit).shape[0]) == 2 * expr(x.shape[0])


def test_spliced_sizes_are_the_batch_at_run_time(symbolic: Any) -> None:
    gm, _, _ = symbolic
    node = next(n for n in gm.graph.nodes if n.target is aten.mul.Tensor)

    def folded(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] * 5, 12) + torch.arange(x.shape[0] * 5).unsqueeze(1)

    with gm.graph.inserting_before(gm.graph.output_node()):
        new = splice(gm.graph, "test", folded, node)
    assert expr(new.meta["val"].shape[0]) == 5 * expr(node.meta["val"].shape[0])
    gm.graph.output_node().args = ((new,),)
    gm.recompile()
    for batch in (2, 3, 7):
        x = torch.randn(batch, 5, 12)
        assert torch.equal(gm(x)[0], folded(x * 2))


def test_where_no_size_is_the_batch_alone(symbolic: Any) -> None:
    _, mode, x = symbolic
    windows = like(x, 4 * x.shape[0], 5, 12)
    literal = LiteralBatch.of(mode, [windows, like(x, 8 * x.shape[0], 5)])
    assert literal is not None and expr(literal.batch) == expr(x.shape[0])
    assert literal.literal(windows).shape[0] == 4 * 1_000_000_007
    for target, args in ((aten.chunk.default, (windows, 2)), (aten.reshape.default, (windows, [-1, 20, 12]))):
        found = on_literal_batch(mode, target, args, {})
        parts = found if isinstance(found, list) else [found]
        assert [expr(part.shape[0]) for part in parts] == [len(parts) * expr(x.shape[0])] * len(parts)


@pytest.mark.parametrize("times", [2, 6, 12])
def test_spliced_sizes_where_no_size_is_the_batch_alone(times: int) -> None:
    class Windows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(-1, 2, 12) * 2

    gm = capture(Windows(), (torch.zeros(3, 12, 12),), {})  # six windows
    node = next(n for n in gm.graph.nodes if n.target is aten.mul.Tensor)

    def rows(x: Tensor) -> Tensor:
        return torch.arange(x.shape[0] // 6 * times).unsqueeze(1) + x[:1, 0]

    with gm.graph.inserting_before(gm.graph.output_node()):
        new = splice(gm.graph, "test", rows, node)
    gm.graph.output_node().args = ((new,),)
    gm.recompile()
    for batch in (2, 3, 7):
        x = torch.randn(batch, 12, 12)
        assert torch.equal(gm(x)[0], torch.arange(batch * times).unsqueeze(1) + x[0, 0] * 2)


def test_one_value_given_twice_stays_two_arguments(symbolic: Any) -> None:
    gm, _, _ = symbolic
    a = gm.graph.find_nodes(op="placeholder")[0]
    with gm.graph.inserting_after(a):
        b = gm.graph.call_function(aten.neg.default, (a,))
    b.meta["val"] = a.meta["val"]  # alike, so one object
    with gm.graph.inserting_before(gm.graph.output_node()):
        new = splice(gm.graph, "test", lambda p, q: p - q, a, b)
    assert new.args[:2] == (a, b)


def test_a_description_makes_the_tensor_again(symbolic: Any) -> None:
    _, mode, x = symbolic
    again = Described.of(x).fresh(mode)
    assert again is not x and [expr(s) for s in again.shape] == [expr(s) for s in x.shape]
