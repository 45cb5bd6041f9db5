"""Whether the captured graph is the model: both ran once, on the first samples of the caller's own batch.

torch.export records what the model's code does while it is traced. Code that asks whether it is traced, or does what
tracing does not see, may do something else when it runs, and no property of the graph would tell.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from passes.capture.capture import FIXED_BATCH, batched
from passes.capture.first_run import PLAIN, SAMPLES, FirstRun, alike, first_hindrance, outputs_of
from passes.graph.aliasing import moves_statistics, written_outside
from passes.graph.base import Refusal
from passes.graph.codes import Code
from passes.network.branches import module_path
from rs_compile.state import autocast_state

_WAY_OUT = (
    "let that code do the same while it is traced (what it asks of torch.compiler.is_exporting, torch.jit.is_tracing "
    "or a global flag is the usual cause); optimize(..., verify=False) takes the graph as it is"
)


def check_faithful(
    model: nn.Module, gm: GraphModule, first: FirstRun, leaves: Sequence[Any], spec: pytree.TreeSpec
) -> str:
    """Runs the captured graph on what the model ran on before its capture, and holds their outputs against each other.

    Both draw the same random numbers; the generators' state is put back.

    Args:
        model: what was captured.
        gm: the graph as torch.export gave it.
        first: the model's run before that.
        leaves: the flat inputs of the call.
        spec: how they are nested.

    Returns:
        Why they were not compared, "" where they were and agree.

    Raises:
        Refusal: they do not agree.
    """
    if why := hindrance(model, gm, leaves) or first.why:
        return why
    wanted, few = first.outputs, first.leaves
    if FIXED_BATCH.get(gm) and not _same_sizes(few, leaves):
        few = leaves  # the graph is right for all of them only
        wanted = outputs_of(model, few, spec)
    with alike(few):
        try:
            got = gm(*few)
        except Exception as error:  # a check that holds in the model's own code no more
            what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise Refusal(
                f"torch.export captured a graph that does not run: {what}", None, _WAY_OUT, code=Code.NOT_THE_MODEL
            ) from error
    tolerance = tolerance_of([*model.parameters(), *few, *wanted])
    wrong = wrong_outputs(got, wanted, tolerance)
    if wrong:
        agrees, differs = where_apart(model, gm, few, spec, tolerance)
        since = f"; up to {agrees.name} they agree" if agrees is not None else ""
        raise Refusal(
            f"torch.export captured something else than the model does: {wrong}{since}",
            differs,
            _WAY_OUT,
            code=Code.NOT_THE_MODEL,
        )
    return ""


def _same_sizes(some: Sequence[Any], all_: Sequence[Any]) -> bool:
    return all(a.shape == b.shape for a, b in zip(some, all_, strict=True) if isinstance(a, Tensor))


def first_samples(leaves: Sequence[Any], gm: GraphModule) -> list[Any]:
    """Two samples of the batch, where the graph is right for any number: what is the same for two is for all."""
    if FIXED_BATCH.get(gm):
        return list(leaves)
    return [leaf[:SAMPLES] if over else leaf for leaf, over in zip(leaves, batched(leaves), strict=True)]


def hindrance(model: nn.Module, gm: GraphModule, leaves: Sequence[Any]) -> str:
    """Why the model must not, or cannot, be run once more; "" where it can."""
    if training := in_train_mode(model, gm):
        return f"{training}; compared in eval mode only"
    outside = written_outside(gm.graph)
    written = f"the model writes into {outside.name}, and every run would do so again" if outside is not None else ""
    return first_hindrance(model, leaves) or written


def in_train_mode(model: nn.Module, gm: GraphModule) -> str:
    """What one more run in train mode would change besides its outputs; "" in eval mode."""
    if not any(module.training for module in model.modules()):
        return ""
    norm = next(filter(moves_statistics, gm.graph.nodes), None)
    if norm is None:
        return "in train mode a run may change the model (a count, a moving average)"
    return f"in train mode a run moves the running statistics of {module_path(norm) or norm.name}"


def tolerance_of(values: Sequence[Any]) -> float:
    """Half the digits of the shortest dtype at work: the ops are the same, their kernels need not be."""
    dtypes = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.element_size() > 1}
    dtypes |= {torch.float32, *dict(autocast_state()).values()}
    return float(max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5)


def wrong_outputs(got: Sequence[Any], wanted: Sequence[Any], tolerance: float) -> str:
    """What is wrong with the outputs, "" where they agree."""
    if len(got) != len(wanted):
        return f"{len(got)} outputs instead of {len(wanted)}"
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {i} is {list(a.shape)} {a.dtype} instead of {list(b.shape)} {b.dtype}"
        apart = gap(a, b)
        if not apart <= tolerance:
            return f"output {i} {list(b.shape)} differs by {apart:.1e} of its largest value"
    return ""


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference relative to the largest value; of integers the share that differs."""
    if not b.numel() or torch.equal(a, b):
        return 0.0
    if not (b.is_floating_point() or b.is_complex()):
        return (a != b).double().mean().item()
    same = (a == b) | (a.isnan() & b.isnan())
    finite = b[b.isfinite()]
    scale = finite.abs().max().double().item() if finite.numel() else 0.0
    apart = (a - b).abs().double().masked_fill(same, 0.0).nan_to_num(nan=torch.inf)
    return apart.max().item() / (scale or 1.0)


def where_apart(
    model: nn.Module,
    gm: GraphModule,
    leaves: Sequence[Any],
    spec: pytree.TreeSpec,
    tolerance: float,
    mode: AbstractContextManager[Any] = PLAIN,
) -> tuple[Node | None, Node | None]:
    """The last value in which the two agree, and the first in which they do not, by what modules give back."""
    given: dict[str, list[Any]] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, path=path: given.setdefault(path, []).append(out))
        for path, module in model.named_modules()
    ]
    try:
        outputs_of(model, leaves, spec, mode)
    finally:
        for hook in hooks:
            hook.remove()
    ends: dict[str, Node] = {}  # by module, the last op in it
    for node in gm.graph.nodes:
        names = module_path(node).split(".") if node.op == "call_function" else []
        ends |= {".".join(names[: i + 1]): node for i in range(len(names))}
    at = {node: path for path, node in reversed(ends.items()) if len(given.get(path, ())) == 1}
    agrees: Node | None = None
    with alike(leaves):
        for node, value in _Values(gm).of(leaves):
            outs = pytree.tree_leaves(given[at[node]]) if node in at else []
            wanted = next((out for out in outs if isinstance(out, Tensor)), None)
            if wanted is None or not isinstance(value, Tensor) or value.shape != wanted.shape:
                continue
            if wrong_outputs([value], [wanted], tolerance):
                return agrees, node
            agrees = node
    return agrees, None


def values_of(gm: GraphModule, leaves: Sequence[Any], nodes: Collection[Node]) -> dict[Node, Any]:
    """What these nodes compute."""
    with alike(leaves):
        values = [(n, value) for n, value in _Values(gm).of(leaves) if n in nodes]
    return dict(values)


class _Values(Interpreter):
    """Each op of a graph with its value, in order."""

    def of(self, leaves: Sequence[Any]) -> Iterator[tuple[Node, Any]]:
        self.args_iter = iter(leaves)
        for node in self.graph.nodes:
            self.env[node] = self.run_node(node)
            yield node, self.env[node]
            for gone in self.user_to_last_uses.get(node, []):
                del self.env[gone]
