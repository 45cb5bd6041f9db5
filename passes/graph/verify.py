"""What must hold of a graph between passes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.graph.base import CompileError, Refusal
from passes.graph.fake import describe
from passes.graph.layout import expr
from passes.graph.splice import fake, fake_mode


def no_stale_shapes(gm: GraphModule) -> None:
    """Recomputes every value on fake tensors and compares shape, dtype and device with what the graph says.

    Raises:
        CompileError: an op does not run, or gives another shape than its node records.
        Refusal: the shape depends on the data.
    """
    mode = fake_mode(gm.graph)
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target._schema.is_mutable or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        try:
            val = describe(mode, node.target, fake(node.args), fake(node.kwargs))
        except Exception as error:
            raise CompileError(f"{node.name} ({node.target}) does not run: {error}") from error
        said = node.meta["val"]
        same = len(val.shape) == len(said.shape) and all(
            expr(a) == expr(b) for a, b in zip(val.shape, said.shape, strict=True)
        )
        if not same and torch.Tag.dynamic_output_shape in node.target.tags:
            raise Refusal(
                "how many entries it gives depends on the data (a boolean mask, nonzero)",
                node,
                "let the model take a fixed number of them (topk, or a slice of argsort, and gather)",
            )
        if not same or val.dtype != said.dtype or val.device != said.device:
            raise CompileError(
                f"{node.name} ({node.target}) gives {tuple(val.shape)}, its node says {tuple(said.shape)}"
            )


def not_put_back(gm: GraphModule, full: Node) -> None:
    """A selection must not be half-done: nothing may still read what `InsertSelection` put back.

    Args:
        gm: the graph after `RestoreTokens`.
        full: the value that it put back, `Site.full`.

    Raises:
        CompileError: part of the network still runs on every token.
    """
    if any(node is full for node in gm.graph.nodes):
        readers = ", ".join(user.name for user in full.users)
        raise CompileError(f"{full.name} puts pruned tokens back at once, and is still read by {readers}")
