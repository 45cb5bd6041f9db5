"""What must hold of a graph between passes."""

from __future__ import annotations

from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from passes.graph.base import CompileError, Refusal
from passes.graph.codes import Code
from passes.graph.fake import LiteralBatch
from passes.graph.layout import expr
from passes.graph.splice import fake, fake_mode


def no_stale_shapes(gm: GraphModule) -> None:
    """Runs the graph on fake tensors, from its inputs on, and compares each value with what its node says.

    What passes remember of ops is not asked, so an error there cannot hide. An op that does not run on a literal batch
    (samples beside samples) runs by itself on what the nodes before it say. Shapes, dtypes and devices are compared.

    Raises:
        CompileError: an op does not run, or gives another shape than its node records.
        Refusal: the shape depends on the data.
    """
    mode = fake_mode(gm.graph)
    inputs = [n.meta.get("val") for n in gm.graph.find_nodes(op="placeholder")]
    batch = LiteralBatch.of(mode, pytree.tree_leaves(inputs))
    values: dict[Node, Any] = {}
    for node in gm.graph.nodes:
        said = node.meta.get("val")
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            values[node] = _run(mode, node, values, batch)
            if torch.Tag.data_dependent_output in node.target.tags:
                values[node] = said  # a number read from a tensor: each run of it would be another symbol
                continue
            for have, want in zip(_tensors(values[node]), _tensors(said), strict=False):
                _compare(node, have, want, batch)
        elif node.op == "call_function" and said is not None and not isinstance(said, torch.Tensor):
            values[node] = _run(mode, node, values, batch)  # arithmetic of sizes
        else:
            values[node] = _literal(said, batch)


def _run(mode: FakeTensorMode, node: Node, values: dict[Node, Any], batch: LiteralBatch | None) -> Any:
    """What a node gives on values with a literal batch, or where that does not run, on those that the nodes hold."""
    assert callable(node.target)
    args, kwargs = map_aggregate((node.args, node.kwargs), lambda a: values[a] if isinstance(a, Node) else a)
    try:
        with mode, torch.no_grad():
            return node.target(*args, **kwargs)
    except Exception:
        try:
            with mode, enable_python_dispatcher(), torch.enable_grad():  # keeps the batch symbolic
                return node.target(*fake(node.args), **fake(node.kwargs))
        except Exception as error:
            raise CompileError(f"{node.name} ({node.target}) does not run: {error}", code=Code.FAULT) from error


def _literal(value: Any, batch: LiteralBatch | None) -> Any:
    """A value with a number in the place of the batch symbol, where it has one alone."""

    def one(leaf: Any) -> Any:
        try:
            return leaf if batch is None else batch.literal(leaf)
        except ValueError:
            return leaf

    return pytree.tree_map(one, value)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [v for v in pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]


def _compare(node: Node, have: torch.Tensor, said: torch.Tensor, batch: LiteralBatch | None) -> None:
    shape, want = [*map(expr, have.shape)], [expr(_literal(size, batch)) for size in said.shape]
    want = shape if shape == [*map(expr, said.shape)] else want  # ran on the symbol
    if shape != want and isinstance(node.target, OpOverload) and torch.Tag.dynamic_output_shape in node.target.tags:
        raise Refusal(
            "how many entries it gives depends on the data (a boolean mask, nonzero)",
            node,
            "let the model take a fixed number of them (topk, or a slice of argsort, and gather)",
            code=Code.DATA_DEPENDENT,
        )
    if (have.dtype, have.device, shape) != (said.dtype, said.device, want):
        raise CompileError(
            f"{node.name} ({node.target}) gives {_shown(have, batch)}, its node says {tuple(said.shape)}",
            code=Code.FAULT,
        )


def _shown(value: torch.Tensor, batch: LiteralBatch | None) -> tuple[Any, ...]:
    try:
        return tuple(value.shape) if batch is None else batch.described(value).shape
    except ValueError:
        return tuple(value.shape)
