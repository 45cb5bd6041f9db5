"""Canonicalise: each rule fires, keeps values, gradients and aliasing, and leaves what only looks alike."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from passes.cleanup.canonicalise import Canonicalise
from passes.graph.base import PassResult

torch.set_num_threads(1)


class Fn(nn.Module):
    """A function with a parameter `w` [4] and buffers `b` [4], `count` []."""

    def __init__(self, fn: Callable[..., object]) -> None:
        super().__init__()
        self.fn = fn
        self.w = nn.Parameter(torch.linspace(-1, 1, 4))
        self.register_buffer("b", torch.linspace(1, 2, 4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> object:
        return self.fn(self, x)


def capture(module: nn.Module, x: Tensor) -> GraphModule:
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: Dim.AUTO},), strict=False)
    return exported.module(check_guards=False)


def inputs(batch: int = 3) -> Tensor:
    return torch.linspace(-2, 2, batch * 4).reshape(batch, 4).requires_grad_()


def leaves(out: object) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]


def run(module: nn.Module, batch: int) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, then the gradients of the input and of `w`, for one run with fixed randomness."""
    x = inputs(batch)
    torch.manual_seed(0)
    outs = leaves(module(x))
    tracked = [t for t in outs if t.requires_grad]
    module.zero_grad()
    if tracked:
        sum((t * torch.arange(1.0, t.numel() + 1).reshape(t.shape)).sum() for t in tracked).backward()
    grads = [x.grad, *(p.grad for p in module.parameters())]
    return outs, grads


def canonical(fn: Callable[..., object]) -> tuple[list[str], PassResult]:
    """Runs the pass, checks it against the model bit by bit and returns the op names that are left."""
    model = Fn(fn)
    result = Canonicalise()(capture(copy.deepcopy(model), inputs().detach()))
    for batch in (2, 5):
        outs, grads = run(result.gm, batch)
        want, want_grads = run(model, batch)
        assert len(outs) == len(want)
        for a, b in zip(outs, want, strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride() and a.requires_grad == b.requires_grad
            assert torch.equal(a, b)
        for g, h in zip(grads, want_grads, strict=True):
            assert (g is None and h is None) or torch.equal(g, h)
        for name, buffer in model.named_buffers():
            assert torch.equal(result.gm.get_buffer(name), buffer)
    left = [str(n.target) for n in result.gm.graph.nodes if n.op == "call_function"]
    again = Canonicalise()(result.gm)
    assert again.rewrites == 0
    assert [str(n.target) for n in again.gm.graph.nodes if n.op == "call_function"] == left
    return [name.removeprefix("aten.") for name in left], result


F = torch.nn.functional
IDLE = {
    "dropout, p = 0": lambda m, x: F.dropout(x * 2, 0.0, True) + 1,
    "dropout in eval": lambda m, x: F.dropout(x * 2, 0.5, False) + 1,
    "dropout in place in eval": lambda m, x: F.dropout(x * 2, 0.5, False, inplace=True) + 1,
    "feature dropout": lambda m, x: F.feature_alpha_dropout(x * 2, 0.5, False) + 1,
    "alpha dropout": lambda m, x: F.alpha_dropout(x * 2, 0.5, False) + 1,
    "cast to its dtype": lambda m, x: (x * 2).to(torch.float32) + 1,
    "cast to its device": lambda m, x: (x * 2).to("cpu") + 1,
    "cast with copy": lambda m, x: (x * 2).to(torch.float32, copy=True) + 1,
    "type_as": lambda m, x: (x * 2).type_as(x) + 1,
    "clone": lambda m, x: (x * 2).clone() + 1,
    "clone of an input": lambda m, x: x.clone() * 2 + 1,
    "alias": lambda m, x: torch.ops.aten.alias(x * 2) + 1,
    "full slice": lambda m, x: (x * 2)[:, 0:] + 1,
    "full slice of the batch": lambda m, x: (x * 2)[:] + 1,
    "expand": lambda m, x: (x * 2).expand(-1, 4) + 1,
    "reshape": lambda m, x: (x * 2).reshape(-1, 4) + 1,
    "view": lambda m, x: (x * 2).view(x.shape[0], 4) + 1,
    "reshape there and back": lambda m, x: (x * 2).reshape(-1, 2, 2).flatten(1) + 1,
    "chain": lambda m, x: F.dropout((x * 2).clone()[:, :].contiguous().view(-1, 4), 0.1, False) + 1,
}


@pytest.mark.parametrize("name", IDLE)
def test_removes_what_does_nothing(name: str) -> None:
    ops, result = canonical(IDLE[name])
    assert [op for op in ops if not op.startswith("sym_size")] == ["mul.Tensor", "add.Tensor"]
    assert result.rewrites > 0
    assert result.skips == ()


def test_contiguous_of_contiguous() -> None:
    gm = capture(Fn(lambda m, x: x * 2 + 1), inputs().detach())  # export itself drops it where it traces it
    mul = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)[0]
    with gm.graph.inserting_after(mul):
        node = gm.graph.call_function(torch.ops.aten.contiguous.default, (mul,))
    mul.replace_all_uses_with(node, lambda user: user is not node)
    node.meta["val"] = mul.meta["val"]
    result = Canonicalise()(gm)
    assert result.rewrites == 1
    assert torch.equal(result.gm(inputs()), inputs() * 2 + 1)


BUSY = {
    "dropout": (lambda m, x: F.dropout(x * 2, 0.5, True) + 1, "dropout.default"),
    "cast": (lambda m, x: (x * 2).to(torch.float64) + 1, "to.dtype"),
    "contiguous of a transposed": (
        lambda m, x: (x * 2).view(-1, 2, 2).mT.contiguous() + 1,
        "contiguous.default",
    ),
    "clone of an expanded": (lambda m, x: m.w.expand(2, 4).clone().view(-1) * x.sum(), "clone.default"),
    "clone that changes layout": (
        lambda m, x: (x * 2).view(-1, 2, 2).mT.clone(memory_format=torch.contiguous_format).view(-1, 4),
        "clone.default",
    ),
    "slice": (lambda m, x: (x * 2)[:, 1:] + 1, "slice.Tensor"),
    "slice with a step": (lambda m, x: (x * 2)[:, ::2] + 1, "slice.Tensor"),
    "expand": (lambda m, x: (x[:, None] * 2).expand(-1, 2, -1) + 1, "expand.default"),
    "reshape": (lambda m, x: (x * 2).reshape(-1, 2, 2) + 1, "reshape.default"),
    "reshape of a reshape": (lambda m, x: (x * 2).reshape(-1, 2, 2).reshape(-1, 2) + 1, "reshape.default"),
    "detach": (lambda m, x: (x * 2).detach() + x, "detach.default"),
    "detach of a parameter": (lambda m, x: x + m.w.detach(), "detach.default"),
    "returned clone of an input": (lambda m, x: x.clone(), "clone.default"),
    "returned clone of a parameter": (lambda m, x: (x + 1, m.w.clone()), "clone.default"),
    "returned clone of a buffer, viewed": (lambda m, x: (x + 1, m.b.clone().view(2, 2)), "clone.default"),
    "returned clone of another output": (lambda m, x: (y := x * 2, y.clone()), "clone.default"),
    "returned view of an input": (lambda m, x: (x.view(-1, 4), x + 1), "view.default"),
    "times one": (lambda m, x: x * 1.0, "mul.Tensor"),
    "plus zero": (lambda m, x: x + 0, "add.Tensor"),
}


@pytest.mark.parametrize("name", BUSY)
def test_keeps_what_does_something(name: str) -> None:
    fn, op = BUSY[name]
    ops, _ = canonical(fn)
    assert op in ops


def test_constants_need_neither_copy_nor_detach() -> None:
    ops, _ = canonical(lambda m, x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]) + m.b.detach())
    assert ops == ["mul.Tensor", "add.Tensor"]


def test_a_returned_constant_stays_the_callers_own() -> None:
    _, result = canonical(lambda m, x: (x + 1, torch.tensor([1.0, 2.0])))
    first = result.gm(inputs())[1]
    first.zero_()
    assert result.gm(inputs())[1].tolist() == [1.0, 2.0]


def test_an_output_that_is_the_input_remains_it() -> None:
    _, result = canonical(lambda m, x: (F.dropout(x, 0.5, False), x.to(torch.float32)))
    x = inputs()
    assert all(out is x for out in result.gm(x))


def test_copies_of_memory_that_is_written_stay() -> None:
    def fn(m: Fn, x: Tensor) -> Tensor:
        before = m.count.clone()
        m.count.add_(1)
        return x + before

    ops, result = canonical(fn)
    assert ops == ["clone.default", "add_.Tensor", "add.Tensor"]
    assert result.skips == ()  # a buffer update is what the model does, not a missed chance


def test_batch_norm_writes_to_its_statistics() -> None:
    with torch.no_grad():
        ops, _ = canonical(lambda m, x: fn_with_var(m, x, training=True))
        assert "clone.default" in ops
        ops, _ = canonical(lambda m, x: fn_with_var(m, x, training=False))
        assert "clone.default" not in ops


def fn_with_var(m: Fn, x: Tensor, training: bool) -> Tensor:
    before = m.b.clone()
    return F.batch_norm(x, m.b, m.b * 0 + 1, training=training) + before


def test_checks_go() -> None:
    def fn(m: Fn, x: Tensor) -> Tensor:
        torch._check(x.shape[0] < 100)
        torch._assert_async((x < 1e6).all())
        return x.to(torch.float64) + 1

    ops, _ = canonical(fn)
    assert ops == ["to.dtype", "add.Tensor"]


IN_PLACE = {
    "relu_": (lambda m, x: (x * 2).relu_() + 1, ["mul.Tensor", "relu.default", "add.Tensor"]),
    "add_": (lambda m, x: (x * 2).add_(m.w, alpha=3), ["mul.Tensor", "add.Tensor"]),
    "clamp_": (lambda m, x: (x * 2).clamp_(-1, 1), ["mul.Tensor", "clamp.default"]),
    "pow_": (lambda m, x: (x * 2).pow_(2), ["mul.Tensor", "pow.Tensor_Scalar"]),
    "scatter_": (
        lambda m, x: torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), 1.0) - x,
        ["zeros_like.default", "argmax.default", "scatter.value", "sub.Tensor"],
    ),
    "hardswish_": (lambda m, x: F.hardswish(x * 2, inplace=True), ["mul.Tensor", "hardswish.default"]),
    "masked_fill_": (
        lambda m, x: (x * 2).masked_fill_(m.b > 1.5, 0.0),
        ["mul.Tensor", "gt.Scalar", "masked_fill.Scalar"],
    ),
    "a chain": (
        lambda m, x: (x * 2).add_(1).mul_(3).relu_(),
        ["mul.Tensor", "add.Tensor", "mul.Tensor", "relu.default"],
    ),
    "on a copy": (lambda m, x: x.clone().add_(1), ["add.Tensor"]),
    "through a full view": (
        lambda m, x: (x * 2)[:, :].add_(1) + 1,
        ["mul.Tensor", "add.Tensor", "add.Tensor"],
    ),
    "narrower target": (
        lambda m, x: (x * 2).half().add_(m.w),
        ["mul.Tensor", "to.dtype", "add.Tensor", "to.dtype"],
    ),
    "copy_": (lambda m, x: (x * 2).copy_(x + m.w) + 1, ["add.Tensor", "add.Tensor"]),
    "a view that nothing else reads": (
        lambda m, x: (x * 2).view(-1, 2, 2).add_(1),
        ["mul.Tensor", "view.default", "add.Tensor"],
    ),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_becomes_out_of_place(name: str) -> None:
    fn, want = IN_PLACE[name]
    ops, result = canonical(fn)
    assert [op for op in ops if not op.startswith("sym_size")] == want
    assert result.skips == ()


def test_later_uses_of_the_target_see_the_new_value() -> None:
    def fn(m: Fn, x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        before = y + 1
        z = y.add_(m.w)
        return before, y, z, y * 3

    ops, result = canonical(fn)
    assert not any("_." in op for op in ops)
    _, y, z, _ = result.gm(inputs())
    assert y is z


SHARED = {
    "slice assignment": lambda m, x: _write(x * 2, lambda y: y[:, :2].mul_(3)),
    "select": lambda m, x: _write(x * 2, lambda y: y[:, 0].copy_(x[:, 1])),
    "item assignment": lambda m, x: _write(x * 2, lambda y: y.__setitem__((slice(None), 0), 0.0)),
    "earlier view read later": lambda m, x: (y := x * 2, v := y.view(-1, 2, 2), y.add_(1), v * 2)[3],
    "undeclared view": lambda m, x: (y := x * 2, v := torch.einsum("ij->ji", y), y.add_(1), v * 2)[3],
    "returned view": lambda m, x: (y := x * 2, v := y.view(-1, 2, 2), y.add_(1), v)[3],
}


def _write(y: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    write(y)
    return y + 1


@pytest.mark.parametrize("name", SHARED)
def test_writes_that_another_alias_shows_stay(name: str) -> None:
    ops, result = canonical(SHARED[name])
    assert any(op.split(".")[0].endswith("_") for op in ops)
    assert any("shares and that is read afterwards" in skip.reason for skip in result.skips)
    assert all(skip.where for skip in result.skips)


def test_writes_to_state_through_a_view_are_reported() -> None:
    ops, result = canonical(lambda m, x: (m.b.view(2, 2).add_(1), x + m.b)[1])
    assert "add_.Tensor" in ops
    assert [s.reason for s in result.skips] == ["writes through a view of an input, a parameter or a buffer"]


def test_random_writes_are_reported() -> None:
    ops, result = canonical(lambda m, x: x * torch.empty(4).bernoulli_(0.5).div_(0.5))
    assert ops == ["empty.memory_format", "bernoulli_.float", "div.Tensor", "mul.Tensor"]
    assert [s.reason for s in result.skips] == ["in-place op without a pointwise out-of-place form"]


def test_meta_stays() -> None:
    _, result = canonical(lambda m, x: (x * 2).add_(1) @ m.w.clone())
    for node in result.gm.graph.nodes:
        if node.op == "call_function":
            assert isinstance(node.meta["val"], Tensor)
            assert "test_canonicalise.py" in node.meta["stack_trace"]


STEPS: dict[str, Callable[[Fn, list[Tensor], Tensor], Tensor]] = {
    "view": lambda m, vs, v: v.view(-1, 2, 2).view(-1, 4),
    "slice": lambda m, vs, v: v[:, :],
    "clone": lambda m, vs, v: v.clone(),
    "alias": lambda m, vs, v: torch.ops.aten.alias(v),
    "detach": lambda m, vs, v: v.detach(),
    "to": lambda m, vs, v: v.to(torch.float32),
    "copy": lambda m, vs, v: v.to(torch.float32, copy=True),
    "mul": lambda m, vs, v: v * 2,
    "weight": lambda m, vs, v: v + m.w,
    "add_": lambda m, vs, v: v.add_(1),
    "mix_": lambda m, vs, v: v.mul_(vs[0].detach() * 0 + 2),
    "half_": lambda m, vs, v: (v[:, :2].add_(3), v)[1],
    "copy_": lambda m, vs, v: v.copy_(m.b.expand_as(v)),
    "relu_": lambda m, vs, v: v.relu_(),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9)), min_size=1, max_size=7),
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
)
def test_any_mix_of_views_copies_and_writes(steps: list[tuple[str, int]], returned: list[int]) -> None:
    """Values and the memory that the caller sees are the model's (no gradients: eager forbids many)."""

    def fn(m: Fn, x: Tensor) -> tuple[Tensor, ...]:
        values = [x, x * 2, m.b + x]
        for step, which in steps:
            # the last values only, so that the input itself is read and viewed, but seldom written
            values.append(STEPS[step](m, values, values[1 + which % (len(values) - 1)]))
        return tuple(values[i % len(values)] for i in returned)

    model = Fn(fn)
    with torch.no_grad():
        gm = Canonicalise()(capture(copy.deepcopy(model), inputs().detach())).gm
        for batch in (2, 3):
            x, y = inputs(batch), inputs(batch)
            want, outs = model(x), gm(y)
            assert torch.equal(x, y)
            assert all(torch.equal(a, b) for a, b in zip(outs, want, strict=True))
            assert shared([*outs, y, *gm.buffers()]) == shared([*want, x, *model.buffers()])


def shared(values: list[Tensor]) -> list[list[bool]]:
    place = [v.untyped_storage().data_ptr() for v in values]
    return [[a == b for a in place] for b in place]
