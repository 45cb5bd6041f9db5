"""A rewritten graph as torch.export's program: the model's signature, parameters and nesting of outputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from passes.capture.capture import batched
from passes.graph.codes import Code
from rs_compile.compiling import Graphs
from rs_compile.errors import named
from rs_compile.exporting.errors import ExportError
from rs_compile.report import Report
from rs_compile.signature import flatten
from rs_compile.state import autocast_state
from rs_compile.traced import traced


class Exported(NamedTuple):
    """What a file is made from.

    Args:
        program: torch.export's, the number of samples open unless `fixed_batch`.
        report: what was rewritten.
        fixed_batch: how many samples it is right for; 0 for any number.
        outputs: the names of its flat outputs.
    """

    program: ExportedProgram
    report: Report
    fixed_batch: int
    outputs: tuple[str, ...]


class _Rewritten(nn.Module):
    """The model with the rewritten graph as its forward; it shares the model's tables, so that names are the same."""

    def __init__(self, entry: nn.Module, graphs: Graphs) -> None:
        super().__init__()
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[table] = entry.__dict__[table]
        self.training = entry.training

        @functools.wraps(entry.forward)  # export names inputs after the arguments
        def forward(*args: Any, **kwargs: Any) -> Any:
            return traced(graphs, self, flatten(args, kwargs)[0])

        self.__dict__["forward"] = forward


def program_of(handle: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Exported:
    """Captures, rewrites and exports a handle's model for inputs like these.

    Args:
        handle: what `optimize` returned.
        args, kwargs: example inputs.

    Raises:
        ExportError: the model is in train mode, or autocast is on.
        CaptureError, Refusal: see `OptimizedModel.forward`.
    """
    if any(module.training for module in handle._model.modules()):
        raise ExportError(
            "the model is in train mode, and a file holds one mode; call fast.eval() first", code=Code.TRAIN_MODE
        )
    if under := autocast_state():
        raise ExportError(
            f"autocast is on for {under[0][0]}, and a file would not have it; leave the autocast block, and convert "
            "the model and the inputs for another dtype: fast.bfloat16()"
        )
    call, graphs = handle._graphs_for(args, kwargs)
    leaves, spec = flatten(call.args, call.kwargs)
    runs = batched(leaves, call.constant)
    open_batch = not graphs.fixed_batch
    given: list[Any] = [
        (torch.cat([leaf, leaf]) if leaf.shape[0] == 1 else leaf) if open_batch and over else leaf
        for leaf, over in zip(leaves, runs, strict=True)
    ]
    dynamic = ShapesCollection()
    for leaf, over in zip(given, runs, strict=True):
        if open_batch and over:
            dynamic[leaf] = {0: Dim.AUTO}
    examples, by_name = pytree.tree_unflatten(given, spec)
    rewritten = _Rewritten(handle._entry, graphs)
    with named("export"), torch.no_grad():
        program = torch.export.export(rewritten, examples, by_name or None, dynamic_shapes=dynamic)
    literal = [
        node.name
        for node in program.graph.find_nodes(op="placeholder")
        if node.name in program.graph_signature.user_inputs
        and isinstance(val := node.meta.get("val"), Tensor)
        and val.dim()
        and isinstance(val.shape[0], int)
    ]
    fixed = next((leaf.shape[0] for leaf, over in zip(given, runs, strict=True) if over), 0) if not open_batch else 0
    if open_batch and len(literal) > sum(isinstance(x, Tensor) and not r for x, r in zip(given, runs, strict=True)):
        raise ExportError(
            f"torch.export fixed the number of samples of {', '.join(literal)}, which the rewritten graph leaves open; "
            "please report this"
        )
    return Exported(program, graphs.pruned.report, fixed, _names(graphs))


def _names(graphs: Graphs) -> tuple[str, ...]:
    """Names for flat outputs: the model's own for fields and keys, `output_0` for places."""
    count = graphs.out_spec.num_leaves
    nested = pytree.tree_unflatten(list(range(count)), graphs.out_spec)
    given: Any = graphs.pruned.gm.graph.output_node().args[0]
    names = []
    for path, i in pytree.tree_leaves_with_path(nested):
        parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        name = "_".join(parts) if parts and not parts[0].isdecimal() else f"output_{i}"
        if i in graphs.kept:
            names += [name, f"{name}_kept"]
        elif given[i] is not None:
            names.append(name)
    return tuple(names)
