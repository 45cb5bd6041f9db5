"""InlineRegions: autocast and no-grad regions vanish, values and gradients stay."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node

from passes.cleanup.canonicalise import Canonicalise
from passes.cleanup.inline_regions import AUTOCAST, SET_GRAD, InlineRegions
from passes.graph.base import PassResult

torch.set_num_threads(1)
aten = torch.ops.aten


class Fn(nn.Module):
    """A function with two linears, a LayerNorm and buffers `b` [4], `count` []."""

    def __init__(self, fn: Callable[..., object]) -> None:
        super().__init__()
        self.fn = fn
        torch.manual_seed(0)
        self.l1, self.l2, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.register_buffer("b", torch.linspace(1, 2, 4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> object:
        return self.fn(self, x)


def capture(module: nn.Module, x: Tensor) -> GraphModule:
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: Dim.AUTO},), strict=False)
    return exported.module(check_guards=False)


def inputs(batch: int = 3) -> Tensor:
    return torch.linspace(-2, 2, batch * 4).reshape(batch, 4).requires_grad_()


def run(module: nn.Module, batch: int) -> tuple[list[Tensor], list[Tensor | None]]:
    x = inputs(batch)
    out = module(x)
    outs = [out] if isinstance(out, Tensor) else list(out)
    module.zero_grad()
    tracked = [t.float().sin().sum() for t in outs if t.requires_grad]
    if tracked:
        sum(tracked).backward()
    return outs, [x.grad, *(p.grad for p in module.parameters())]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for batch in (2, 5):
        (outs, grads), (want, want_grads) = run(a, batch), run(b, batch)
        for out, expected in zip(outs, want, strict=True):
            assert out.dtype == expected.dtype and out.requires_grad == expected.requires_grad
            assert torch.equal(out, expected)
        for grad, expected in zip(grads, want_grads, strict=True):
            assert (grad is None) == (expected is None)
            assert grad is None or torch.equal(grad, expected)
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items() if k in b.state_dict())


def inlined(gm: GraphModule, model: nn.Module, **options: Any) -> PassResult:
    """Runs the pass on a captured graph and compares it with the model, bit by bit, gradients too."""
    result = InlineRegions(**options)(gm)
    assert_same(result.gm, model)
    again = InlineRegions(**options)(result.gm)
    assert again.rewrites == 0 and again.skips == result.skips
    return result


def regions_in(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.target in (AUTOCAST, SET_GRAD)]


def flat(fn: Callable[..., object]) -> GraphModule:
    """The region is there before, gone after, along with the submodule that held it."""
    model = Fn(fn)
    gm = capture(copy.deepcopy(model), inputs().detach())
    assert regions_in(gm)
    result = inlined(gm, model)
    assert result.rewrites > 0 and result.skips == ()
    assert not regions_in(result.gm)
    assert not [name for name, m in result.gm.named_modules() if name and isinstance(m, GraphModule)]
    return result.gm


def ops(gm: GraphModule) -> list[str]:
    return [str(n.target).removeprefix("aten.") for n in gm.graph.nodes if n.op == "call_function"]


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def test_no_grad_table_is_inlined() -> None:
    def rope(m: Fn, x: Tensor) -> Tensor:
        with torch.no_grad():
            angles = torch.outer(torch.arange(4.0), m.b)
        return x @ angles.sin()

    gm = flat(rope)
    assert ops(gm) == ["arange.default", "outer.default", "detach.default", "sin.default", "matmul.default"]
    for node in gm.graph.nodes:
        if node.op == "call_function":
            assert isinstance(node.meta["val"], Tensor)
            assert "test_inline_regions.py" in node.meta["stack_trace"]
            assert node.meta["nn_module_stack"]
    # the table cannot require gradients, so the next pass drops the detach
    assert "detach.default" not in ops(Canonicalise()(gm).gm)


def test_no_grad_cuts_gradients_where_values_leave() -> None:
    def frozen(m: Fn, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            h = m.l1(x).relu_()
            k = h * 2
        return m.l2(h) + k, x * 2

    gm = flat(frozen)
    assert ops(gm).count("detach.default") == 2
    assert ops(Canonicalise()(gm).gm).count("detach.default") == 2


def test_a_tensor_that_passes_through_keeps_its_gradient() -> None:
    def through(m: Fn, x: Tensor) -> Tensor:
        with torch.no_grad():
            same = nn.functional.dropout(x, 0.5, False)
            half = x / 2
        return m.l1(same) + half

    gm = flat(through)
    assert ops(gm).count("detach.default") == 1


def test_gradients_switched_on_between() -> None:
    def between(m: Fn, x: Tensor) -> Tensor:
        with torch.no_grad():
            a = m.l1(x)
            with torch.enable_grad():
                b = m.l2(a)
            c = b + a
        return b + c

    gm = flat(between)
    assert not [op for op in ops(gm) if "set_grad_enabled" in op]


def test_integer_results_are_not_detached() -> None:
    def index(m: Fn, x: Tensor) -> Tensor:
        with torch.no_grad():
            order = m.l1(x).argsort(-1)
        return x.gather(1, order)

    assert "detach.default" not in ops(flat(index))


def test_counter_in_a_region_still_counts() -> None:
    def counted(m: Fn, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.count.add_(1)
        return m.l1(x)

    assert "add_.Tensor" in ops(flat(counted))


def test_frozen_batch_norm_in_training_is_inlined() -> None:
    """Its statistics move, and its counter, as in the model."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.l1, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.norm(self.l1(x)).relu_()
            return self.head(h)

    result = inlined(capture(Frozen(), inputs().detach()), Frozen())
    assert not regions_in(result.gm) and result.skips == ()


def test_running_average_of_a_differentiable_value_stays_in_its_region() -> None:
    def average(m: Fn, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.b.mul_(0.9).add_(x.mean(0))
        return m.l1(x) + m.b

    model = Fn(average)
    result = InlineRegions()(capture(copy.deepcopy(model), inputs().detach()))
    assert [s.reason for s in result.skips] == ["mul_ writes to memory from outside, which autograd would record"]
    assert len(regions_in(result.gm)) == 1


def test_autocast_switched_off_is_inlined_as_it_is() -> None:
    def fp32(m: Fn, x: Tensor) -> Tensor:
        with autocast(enabled=False):
            h = m.l1(x.float())
        return m.l2(h)

    assert ops(Canonicalise()(flat(fp32)).gm) == ["linear.default", "linear.default"]


def test_under_ambient_autocast_regions_stay() -> None:
    def fp32(m: Fn, x: Tensor) -> Tensor:
        with autocast(enabled=False):
            h = m.l1(x)
        return m.l2(h)

    model = Fn(fp32)
    result = inlined(capture(copy.deepcopy(model), inputs().detach()), model, ambient_autocast=True)
    assert result.rewrites == 0
    assert [s.reason for s in result.skips] == ["the graph runs under autocast, which this region switches"]
    with autocast():
        assert torch.equal(result.gm(inputs()), model(inputs()))


ENABLED: dict[str, Callable[[Fn, Tensor], object]] = {
    "linear": lambda m, x: m.l1(x),
    "two linears": lambda m, x: m.l2(m.l1(x)),
    "linear on fp32 residual": lambda m, x: x + m.l2(m.norm(m.l1(x)).relu()),
    "matmul": lambda m, x: x @ m.l1.weight,
    "same value twice": lambda m, x: (y := x[:, :, None] * m.b, torch.bmm(y, y))[1],
    "attention": lambda m, x: (
        q := m.l1(x)[None, None],
        nn.functional.scaled_dot_product_attention(q, q, x[None, None]),
    )[1],
    "widest of a list": lambda m, x: torch.cat([m.l1(x), x], 1),
    "fp32 list": lambda m, x: nn.functional.mse_loss(m.l1(x), x),
    "softmax": lambda m, x: m.l1(x).softmax(-1),
    "nothing to do": lambda m, x: nn.functional.dropout(m.l1(x), 0.1, False).to(torch.bfloat16),
    "in place": lambda m, x: m.l1(x).add_(1).relu_(),
    "convolution": lambda m, x: nn.functional.conv1d(x[:, None], m.l1.weight[:, None], padding=1),
}


@pytest.mark.parametrize("name", ENABLED)
def test_casts_of_enabled_autocast_become_explicit(name: str) -> None:
    fn = ENABLED[name]

    def region(m: Fn, x: Tensor) -> object:
        with autocast():
            return fn(m, x)

    gm = flat(region)
    assert "to.dtype" in ops(gm)
    for node in gm.graph.nodes:  # what is written down is what the ops really give
        if node.op == "call_function" and isinstance(node.meta["val"], Tensor):
            args = torch.fx.node.map_arg(node.args, lambda n: n.meta["val"])
            with node.meta["val"].fake_mode, torch.no_grad():
                assert node.target(*args, **node.kwargs).dtype == node.meta["val"].dtype


def test_ops_that_autocast_leaves_alone_get_no_casts() -> None:
    def region(m: Fn, x: Tensor) -> Tensor:
        with autocast():
            return nn.functional.gelu(x * 2) + m.b

    assert ops(flat(region)) == ["mul.Tensor", "gelu.default", "add.Tensor"]


def test_a_composite_that_casts_inside_stays_with_a_reason() -> None:
    def region(m: Fn, x: Tensor) -> Tensor:
        with autocast():
            return torch.einsum("ij,kj->ik", x, m.l1.weight)

    model = Fn(region)
    result = inlined(capture(copy.deepcopy(model), inputs().detach()), model)
    assert [s.reason for s in result.skips] == [
        "what autocast does to aten.einsum.default cannot be written as casts of its arguments"
    ]
    assert len(regions_in(result.gm)) == 1


def test_autocast_on_and_off_and_no_grad_nested() -> None:
    def nested(m: Fn, x: Tensor) -> Tensor:
        with torch.no_grad():
            t = m.l2(x)
            with autocast():
                u = m.l1(t)
                with autocast(enabled=False):
                    v = m.l2(u.float())
        return m.norm(x) + v * t

    assert "detach.default" in ops(flat(nested))


def body(names: str, build: Callable[..., Any], owner: nn.Module, vals: list[Tensor]) -> GraphModule:
    graph = torch.fx.Graph()
    placeholders = [graph.placeholder(name) for name in names.split()]
    for node, val in zip(placeholders, vals, strict=True):
        node.meta["val"] = val
    graph.output(build(graph, *placeholders))
    return GraphModule(owner, graph)


def call(graph: torch.fx.Graph, target: Any, *args: Any) -> Node:
    """Adds a call with its fake value."""
    node = graph.call_function(target, args)
    if target not in (AUTOCAST, SET_GRAD):
        fakes = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = target(*fakes)
    return node


def test_parameters_of_a_body_move_out_under_names_of_their_own() -> None:
    model = Fn(lambda m, x: x * 2)
    gm = capture(copy.deepcopy(model), inputs().detach())
    (mul,) = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    owner = nn.Module()
    owner.register_parameter("w", nn.Parameter(torch.ones(4)))
    owner.register_buffer("b", torch.full((4,), 3.0), persistent=False)

    def build(graph: torch.fx.Graph, x: Node) -> tuple[Node, ...]:
        w, b = graph.get_attr("w"), graph.get_attr("b")
        w.meta["val"] = b.meta["val"] = mul.meta["val"][0]
        return (call(graph, aten.add.Tensor, call(graph, aten.mul.Tensor, x, w), b),)

    gm.hidden = body("x", build, owner, [mul.meta["val"]])
    with gm.graph.inserting_before(gm.graph.output_node()):
        inside = gm.graph.call_function(AUTOCAST, ("cpu", None, False, None, gm.graph.get_attr("hidden"), mul))
        out = gm.graph.call_function(operator.getitem, (inside, 0))
    mul.replace_all_uses_with(out, lambda user: user.op == "output")
    result = InlineRegions()(gm)
    assert result.rewrites == 1
    assert not hasattr(result.gm, "hidden")
    assert torch.equal(result.gm(inputs()), inputs() * 2 + 3)
    assert result.gm.w is owner.w and torch.equal(result.gm.b, model.b)
    names = {n.target for n in result.gm.graph.nodes if n.op == "get_attr"}
    assert names == {"w", "b_1"}  # the model has a `b` already
    assert "b_1" not in result.gm.state_dict()


def nested_gradients(outer: bool, inner: bool) -> GraphModule:
    """y = linear(x); with set_grad(outer): z = y * 2; with set_grad(inner): out = z * y; return out."""
    gm = capture(Fn(lambda m, x: m.l1(x)), inputs().detach())
    y = gm.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    val = y.meta["val"]

    def inner_body(graph: torch.fx.Graph, z: Node, w: Node) -> tuple[Node, ...]:
        return (call(graph, aten.mul.Tensor, z, w),)

    owner = nn.Module()
    owner.deep = body("z w", inner_body, nn.Module(), [val, val])

    def outer_body(graph: torch.fx.Graph, w: Node) -> tuple[Node, ...]:
        z = call(graph, aten.mul.Tensor, w, 2)
        made = call(graph, SET_GRAD, inner, graph.get_attr("deep"), z, w)
        out = graph.call_function(operator.getitem, (made, 0))
        out.meta["val"] = val
        return (out,)

    gm.hidden = body("w", outer_body, owner, [val])
    with gm.graph.inserting_before(gm.graph.output_node()):
        inside = gm.graph.call_function(SET_GRAD, (outer, gm.graph.get_attr("hidden"), y))
        out = gm.graph.call_function(operator.getitem, (inside, 0))
    y.replace_all_uses_with(out, lambda user: user.op == "output")
    gm.recompile()
    return gm


@pytest.mark.parametrize(("outer", "inner"), [(True, True), (True, False), (False, False)])
def test_nested_gradient_regions(outer: bool, inner: bool) -> None:
    want = nested_gradients(outer, inner)
    result = inlined(nested_gradients(outer, inner), want)
    assert result.rewrites == 2
    assert not regions_in(result.gm)


def test_gradients_switched_on_inside_a_region_without_stay() -> None:
    result = inlined(nested_gradients(False, True), nested_gradients(False, True))
    assert result.rewrites == 0
    assert [s.reason for s in result.skips] == ["gradients are switched back on inside a region without gradients"]


def test_results_used_as_one_value_stay() -> None:
    gm = nested_gradients(False, False)
    (region,) = regions_in(gm)
    gm.graph.output_node().args = ((region,),)
    result = InlineRegions()(gm)
    assert [s.reason for s in result.skips] == ["the region's results are used as one value"]
