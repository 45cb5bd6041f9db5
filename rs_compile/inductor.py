"""What `torch.compile` is told about a rewritten graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch.fx import GraphModule

from rs_compile.direct import direct

# a sum of two tensors stays open, a sum of three is stored: kept tokens are then gathered once, by the norm that reads
# them first, the residual stream moves through memory less, and there are a third fewer kinds of kernels to compile
_STORE_SUMS = {"realize_reads_threshold": 2}


def inductor_options(gm: GraphModule, mode: str | None) -> dict[str, Any]:
    """Inductor's options for a graph, those of `torch.compile`'s mode among them.

    Args:
        gm: with fake values in meta["val"], which say device and dtypes.
        mode: see `torch.compile`, which takes either a mode or options.

    Returns:
        Empty where the mode says it all.
    """
    values = [val for n in gm.graph.nodes if isinstance(val := n.meta.get("val"), torch.Tensor)]
    half = any(val.dtype in (torch.bfloat16, torch.float16) for val in values)
    if half and all(val.device.type == "cpu" for val in values):
        return {}  # the C++ code would store the sum as the norm reads it, in float32
    return {**torch._inductor.list_mode_options(mode or "default"), **_STORE_SUMS}


def compile_graph(
    gm: GraphModule, backend: str | Callable[..., Any], mode: str | None, given: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """`torch.compile` of a rewritten graph, without Dynamo where that can be.

    Args:
        backend, mode: see `optimize`.
        given: the user's options, which go before ours.
    """
    gm = flattened(gm)
    if backend != "inductor":
        more: dict[str, Any] = {} if given is None else {"options": dict(given)}
        return torch.compile(gm, backend=backend, mode=mode, **more)
    options = {**inductor_options(gm, mode), **(given or {})}
    told: dict[str, Any] = {"options": options} if options else {"mode": mode}
    compiled = torch.compile(gm, backend=backend, **told)
    # modes that search or record CUDA graphs were never tried without Dynamo: there was no GPU
    plain = mode in (None, "default") and not torch._inductor.config.triton.cudagraphs
    return direct(gm, options, compiled) if plain else compiled


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
