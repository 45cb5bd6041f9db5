"""What `torch.compile` is told about a rewritten graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch.fx import GraphModule

# every residual sum is stored where it is first read: kept tokens are then gathered once, by the norm that reads
# them first, the residual stream moves through memory less, and there are a third fewer kinds of kernels to compile
_OPTIONS = {"realize_reads_threshold": 1}


def inductor_options(mode: str | None) -> dict[str, Any]:
    """Inductor's options for a rewritten graph, those of `torch.compile`'s mode among them.

    Args:
        mode: see `torch.compile`, which takes either a mode or options.
    """
    return {**torch._inductor.list_mode_options(mode or "default"), **_OPTIONS}


def compile_graph(gm: GraphModule, backend: str | Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    """`torch.compile` of a rewritten graph; see `optimize` for backend and mode."""
    gm = flattened(gm)
    if backend == "inductor":
        return torch.compile(gm, backend=backend, options=inductor_options(mode))
    return torch.compile(gm, backend=backend, mode=mode)


def flattened(gm: GraphModule) -> GraphModule:
    """The same graph on the same parameters in one module: torch.compile takes long to follow modules in modules."""
    graph = copy.deepcopy(gm.graph)
    names: dict[str, str] = {}  # by where it is in the graph's modules
    for node in graph.find_nodes(op="get_attr"):
        where = str(node.target)
        node.target = names.setdefault(where, f"_{len(names)}_{where.rpartition('.')[2]}")
    owned = {name: attrgetter(where)(gm) for where, name in names.items()}
    flat = GraphModule(owned, graph, type(gm).__name__)
    flat.meta = gm.meta
    return flat.train(gm.training)
