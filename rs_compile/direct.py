"""Inductor without Dynamo, for calls like the first: the graph is there, and following its code again takes a second.

Torch's own guards tell whether a call is like the one that was compiled for. Every other call, of another size or with
gradients, is `torch.compile`'s.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch.autograd import forward_ad
from torch.fx import GraphModule, Node

from passes.graph.aliasing import written_outside
from rs_compile.guard import Run

_KINDS = (Tensor, nn.Parameter, nn.Buffer)
_COMPILING = threading.RLock()
_log = logging.getLogger(__name__)


def direct(gm: GraphModule, options: dict[str, Any], otherwise: Run) -> Run:
    """A run of the graph that needs Dynamo for calls only that are not like the first.

    Args:
        gm: with all its parameters in one module, and fake values in meta["val"].
        options: Inductor's, without CUDA graphs.
        otherwise: the graph under `torch.compile`, called with the same leaves.

    Returns:
        `otherwise` itself where the graph writes into what is not its own, reads an input that is no tensor, or has
        parameters that are none of torch's own.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    takes = [isinstance(node.meta.get("val"), Tensor) for node in inputs]
    weights = (*gm.parameters(), *gm.buffers())
    unread = all(taken or not node.users for node, taken in zip(inputs, takes, strict=True))
    able = unread and _plain(weights) and written_outside(gm.graph) is None
    return Direct(gm, takes, weights, options, otherwise) if able else otherwise


@dataclass(frozen=True)
class _Made:
    """What Inductor made of the graph for one call, and torch's guards on that call."""

    run: Run
    state: Any  # grad mode, autocast, threads, precision, determinism
    tensors: Any  # dispatch keys, dtype, device, sizes, strides, requires_grad of the parameters, then the inputs


class Direct:
    """A graph, compiled for the first call without gradients, and `torch.compile`'s for any other; see `direct`."""

    def __init__(
        self,
        gm: GraphModule,
        takes: Sequence[bool],
        weights: Sequence[Tensor],
        options: dict[str, Any],
        otherwise: Run,
    ) -> None:
        self._gm, self._takes, self._weights, self._options, self._otherwise = gm, takes, weights, options, otherwise
        self._made: _Made | None = None
        self._able = True

    def __call__(self, *leaves: Any) -> Any:
        if self._able and _nothing_watches():
            given = [leaf for leaf, taken in zip(leaves, self._takes, strict=True) if taken]
            made = self._made or self._make(given)
            if made is not None and made.state.check() and made.tensors.check(*self._weights, *given):
                return made.run(*given)
        return self._otherwise(*leaves)

    def _make(self, given: Sequence[Any]) -> _Made | None:
        """Compiles for tensors like these; None where they are none of torch's own, or one is given twice."""
        if not _plain(given) or len({id(t) for t in given}) < len(given):
            return None
        with _COMPILING:
            if self._made is None and self._able:
                try:
                    self._made = self._compile(given)
                except Exception as error:  # another version of torch may not know what is called here
                    self._able = False
                    _log.info("Dynamo is used; Inductor did not take the graph as it is: %s", error, exc_info=True)
        return self._made

    def _compile(self, given: Sequence[Tensor]) -> _Made:
        # imported late: torch has not loaded its compiler yet
        from torch._C._dynamo.guards import GlobalStateGuard, TensorGuards
        from torch._inductor.compile_fx import compile_fx
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        graph = copy.deepcopy(self._gm.graph)  # Inductor writes into it
        for node, taken in zip(graph.find_nodes(op="placeholder"), self._takes, strict=True):
            if not taken:
                graph.erase_node(node)
        returned = graph.output_node()
        outputs: Any = returned.args[0]
        returned.args = (tuple(out for out in outputs if isinstance(out, Node)),)
        own = GraphModule(self._gm, graph)
        with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))):
            compiled: Any = compile_fx(own, given, config_patches=self._options, ignore_shape_env=True)

        def run(*leaves: Tensor) -> list[Any]:
            results = iter(compiled(*leaves))
            return [next(results) if isinstance(out, Node) else out for out in outputs]

        both = (*self._weights, *given)
        sizes: Any = [list(t.shape) for t in both]
        strides: Any = [list(t.stride()) for t in both]
        guards = TensorGuards(*both, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        return _Made(run, GlobalStateGuard(), guards)


def _plain(tensors: Sequence[Any]) -> bool:
    return all(type(t) in _KINDS and t.layout is torch.strided for t in tensors)


def _nothing_watches() -> bool:
    """Whether the call is no one's to differentiate, trace, transform or override: that is Dynamo's to follow."""
    from torch._dynamo import config, eval_frame

    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or config.disable
        or eval_frame._stance.stance != "default"
    )
