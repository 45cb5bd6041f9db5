"""A rewritten graph op by op, for who traces a call of it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from rs_compile.compiling import Graphs


def traced(graphs: Graphs, model: nn.Module, leaves: Sequence[Any]) -> Any:
    """The rewritten graph run op by op on the parameters that the model has now, for who traces the call.

    Short token outputs come as plain tuples (tokens, kept positions): a file must load without this package.

    Args:
        leaves: the flat inputs.
    """
    with preserve_node_meta():  # or refusals would name no line of the model
        outputs = _OnModel(graphs.pruned.gm, model).run(*leaves)
    count = graphs.out_spec.num_leaves
    flat = list(outputs[:count])
    for i, positions in zip(graphs.kept, outputs[count:], strict=True):
        flat[i] = (flat[i], positions)
    return pytree.tree_unflatten(flat, graphs.out_spec)


class _OnModel(Interpreter):
    """Runs a captured graph on the parameters that the model has now: torch.export replaces them while it traces."""

    def __init__(self, gm: GraphModule, model: nn.Module) -> None:
        super().__init__(gm)
        self._model = model

    def fetch_attr(self, target: str) -> Any:
        own = super().fetch_attr(target)
        try:
            now = attrgetter(target)(self._model)
        except AttributeError:  # a constant of the graph's
            return own
        return now if isinstance(now, Tensor) and isinstance(own, Tensor) and now.shape == own.shape else own
