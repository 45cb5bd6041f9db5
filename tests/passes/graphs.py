"""What the tests of single passes share: small captured graphs, and tokens leaving at an input.

x is [B, N, C] with B = 3 samples, N = 6 tokens, C = 8 channels, unless a test says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from passes.axes.gather import put, take
from passes.axes.token_axis import TokenAxis, analyse, stream_layout
from passes.capture.capture import capture
from passes.graph.layout import show, tokens_in
from passes.graph.splice import splice
from passes.pipeline import prepare
from passes.sites.retarget import RetargetTokens
from passes.sites.select import keep_highest, protected_mask
from passes.sites.site import SITE, Site

B, N, C = 3, 6, 8
aten = torch.ops.aten


class Applies(nn.Module):
    """A function of the inputs and of tables that the module holds: f(x, *more, *tables)."""

    def __init__(self, f: Callable[..., Any], *tables: Tensor) -> None:
        super().__init__()
        self.f = f
        self.tables = nn.ParameterList([nn.Parameter(t, requires_grad=t.is_floating_point()) for t in tables])

    def forward(self, *inputs: Tensor) -> Any:
        return self.f(*inputs, *self.tables)


def sample(tokens: int = N, channels: int = C, batch: int = B, seed: int = 0) -> Tensor:
    """[B, N, C], the same every time."""
    return torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(seed))


def table(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def graph_of(f: Callable[..., Any] | nn.Module, *inputs: Tensor, tables: tuple[Tensor, ...] = ()) -> GraphModule:
    """The captured graph of a module or a function; of x [3, 6, 8] where no input is given."""
    model = f if isinstance(f, nn.Module) else Applies(f, *tables)
    gm = capture(model.eval(), inputs or (sample(),), {})
    for check in gm.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        gm.graph.erase_node(check)  # as the clean-up passes do
    return gm


def prepared(model: nn.Module, *inputs: Tensor) -> GraphModule:
    """The captured graph after the clean-up passes and with lowered attention."""
    return prepare(model.eval(), inputs or (sample(),), {}, lower=True).gm


def recorded(gm: GraphModule, x: Tensor) -> dict[Node, Any]:
    """What every node computes for x."""
    found: dict[Node, Any] = {}

    class Record(Interpreter):
        def run_node(self, n: Node) -> Any:
            found[n] = result = super().run_node(n)
            return result

    with torch.no_grad():
        Record(gm, garbage_collect_values=False).run(x)
    return found


def only(gm: GraphModule, target: Any, at: int = 0) -> Node:
    """The op with this target (the one at position `at` where there are several)."""
    return list(gm.graph.find_nodes(op="call_function", target=target))[at]


def leaves(gm: GraphModule) -> list[Any]:
    outputs: Any = gm.graph.output_node().args[0]
    return list(outputs)


def first_input(gm: GraphModule) -> Node:
    """The first input x: parameters are no placeholders in a captured graph."""
    return next(n for n in gm.graph.nodes if n.op == "placeholder")


def axis_from_input(gm: GraphModule, prefix: int = 0, suffix: int = 0) -> TokenAxis:
    """The token axis from x on."""
    x = first_input(gm)
    layout, batch = stream_layout(x, prefix, suffix)
    return analyse(gm, x, layout, batch)


def layout_text(axis: TokenAxis, node: Node) -> str:
    """The layout of a value as text, with {tokens} where it holds attention weights."""
    text = show(axis.layouts[node])
    weights = any(t.weights for dim in axis.layouts[node] if (t := tokens_in(dim)))
    return text + (" weights" if weights else "")


def refusals(axis: TokenAxis) -> list[str]:
    """Why ops need every token, the batch symbol written as B; outputs of the model do not count."""
    return [str(r).replace(str(axis.batch.size), "B") for n, r in axis.dense.items() if n.op != "output"]


def importance(x: Tensor) -> Tensor:
    """The score with which the helper below lets tokens leave: [B, N]."""
    return x.sum(-1)


def leave_at_input(gm: GraphModule, keep: int, prefix: int = 0, suffix: int = 0) -> Site:
    """Lets all but `keep` tokens of x leave; what reads x then reads it with everything put back."""
    x = first_input(gm)
    layout, batch = stream_layout(x, prefix, suffix)
    dim = next(d for d, factors in enumerate(layout) if tokens_in(factors))
    tokens = tokens_in(layout[dim])
    assert tokens is not None
    users, graph = list(x.users), gm.graph

    def select(value: Tensor) -> Tensor:
        guard = protected_mask(tokens.dense, prefix, suffix, (), None, value.device)
        return keep_highest(importance(value if dim == 1 else value.transpose(0, 1)), guard, keep)

    with graph.inserting_before(next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))):
        index = splice(graph, "select", select, x)
        short = splice(graph, "gather", lambda v, i: take(v, layout, (dim,), {tokens.pieces: i}), x, index)
        full = splice(graph, "restore", lambda v, s, i: put(v, s, i, layout), x, short, index)
    for user in users:
        user.replace_input_with(x, full)
    site = Site(x, full, short, index, layout, batch, keep - prefix - suffix)
    SITE.put(gm, site)
    return site


def on_short_input(
    gm: GraphModule, *inputs: Tensor, keep: int = 4, prefix: int = 0, suffix: int = 0
) -> tuple[list[Tensor], Tensor]:
    """What every output becomes once x is short, and the kept positions [B, keep]. Uses up `gm`."""
    site = leave_at_input(gm, keep, prefix, suffix)
    gm = RetargetTokens()(gm).gm
    output = gm.graph.output_node()
    short = [site.compact.get(n, n) if isinstance(n, Node) else n for n in leaves(gm)]
    output.args = ((*short, site.index),)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    with torch.no_grad():
        *values, index = gm(*inputs)
    return values, index


def rows(value: Tensor, index: Tensor, samples: int = 0, tokens: int = 1) -> Tensor:
    """Each sample's kept tokens, one sample at a time: what a gather has to equal."""
    parts = [value.select(samples, i).index_select(tokens - (tokens > samples), index[i]) for i in range(len(index))]
    return torch.stack(parts, samples)
