"""Capture: the model as a graph of ATen ops, with a symbolic batch and literal token counts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ShapesCollection, export
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from passes.capture.capture_errors import CaptureError, check_call, check_loaded, does_not_run, not_captured
from passes.capture.constant_inputs import HeldFast, input_names, is_small, written_constant
from passes.capture.first_run import FirstRun, first_run
from passes.capture.left_behind import Kept, Untouched
from passes.graph.base import op_name, source_line
from passes.graph.codes import Code
from passes.graph.facts import Fact
from passes.graph.layout import expr

FIXED_BATCH: Fact[int] = Fact("fixed_batch")  # of graphs: how many samples the graph is right for; 0 for any number
FIRST_RUN: Fact[FirstRun] = Fact("first_run")  # of graphs: the model's run before its capture
OUT_SPEC: Fact[pytree.TreeSpec] = Fact("out_spec")  # of graphs: how the outputs are nested


def batched(leaves: Sequence[Any], constant: Collection[int] = ()) -> list[bool]:
    """Which input leaves run over samples: tensors whose first size is that of the first tensor.

    Args:
        constant: leaves that are the same at every call, and say nothing of samples.
    """
    sizes = [leaf.shape[0] if isinstance(leaf, torch.Tensor) and leaf.dim() else None for leaf in leaves]
    batch = next((s for i, s in enumerate(sizes) if s is not None and i not in constant), None)
    return [s is not None and s == batch and i not in constant for i, s in enumerate(sizes)]


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    constant: Collection[int] = (),
    fixed_batch: bool = False,
) -> GraphModule:
    """Captures `model` for inputs like these, whatever their batch size, after it ran once on two samples of them.

    The graph shares the model's parameters and buffers. Its placeholders are the flat input leaves, its
    output the flat output leaves; `OUT_SPEC.of(gm)` says how they are nested. Where the model's code fixes
    the number of samples, or inputs are constant, so does the graph, and `FIXED_BATCH.of(gm)` is that number.
    `FIRST_RUN.of(gm)` is what the model gave back, for who compares the graph with it, and holds memory.

    The run fills what the model's code caches with values; in train mode, on the meta device and on fake tensors
    there is none. What the code keeps while it is traced is put back. The model runs under autocast where the
    caller does, and is traced without: it acts on the graph's ops when they run, as on the model's.

    Args:
        model: any module; it is not changed, but for what its own code changes when it is called.
        args, kwargs: example inputs. Tensors whose first size is the batch size run over samples.
        constant: flat input leaves that the graph has the values of; it takes them, and does not read them.
        fixed_batch: the model is right for this number of samples only.

    Raises:
        CaptureError: the model does not run on these inputs, torch.export gives up, or the model's code keeps
            values from one call for the next.
    """
    check_call(model, args, kwargs)
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    runs = batched(leaves, constant)
    # an empty batch would make the number of samples a constant
    some = [x.new_zeros(2, *x.shape[1:]) if r and not len(x) else x for x, r in zip(leaves, runs, strict=True)]
    held = HeldFast(model, {i: leaves[i] for i in constant}) if constant else None
    # what is held fast may say how much there is of everything else
    few = [over and held is None and not fixed_batch for over in runs]
    try:
        first = first_run(model, some, spec, few)
    except Exception as error:
        raise does_not_run(model, error, leaves, spec) from error
    check_loaded(model, leaves, first.why)
    exported = None
    if held is None and not fixed_batch:
        # export would take a batch of one for a constant
        doubled = [
            torch.cat([leaf, leaf]) if over and leaf.shape[0] == 1 else leaf
            for leaf, over in zip(some, runs, strict=True)
        ]
        exported = _traced(model, doubled, runs, spec, first)
    if exported is None or _fixed_batch(exported, runs):
        exported = _traced(model, leaves, [False] * len(leaves), spec, first, held)
        FIXED_BATCH.put(exported, next((x.shape[0] for x, over in zip(leaves, runs, strict=True) if over), 0))
    gm = _flat(exported).train(model.training)
    FIRST_RUN.put(gm, first)
    return gm


def _traced(
    model: nn.Module,
    leaves: Sequence[Any],
    runs: Sequence[bool],
    spec: pytree.TreeSpec,
    first: FirstRun,
    held: HeldFast | None = None,
) -> GraphModule:
    """The graph that torch.export gives, and the model as it was before."""
    untouched = Untouched(model)
    try:
        with torch._C._DisableAutocast():
            exported = _export(model, leaves, runs, spec, first, held)
    finally:
        kept = untouched.put_back()
    _keeps_nothing(model, exported, first, leaves, kept)
    return exported


def _keeps_nothing(
    model: nn.Module, exported: GraphModule, first: FirstRun, leaves: Sequence[Any], kept: Sequence[Kept]
) -> None:
    """Refuses a model whose next call would read what this one leaves: the graph keeps nothing."""
    name = f"torch.export cannot capture {type(model).__name__}"
    read = {
        value.untyped_storage()._cdata
        for node in exported.graph.find_nodes(op="get_attr")
        if node.users and _is_tensor(value := attrgetter(str(node.target))(exported))
    }
    for place in kept:
        if any(t.untyped_storage()._cdata in read for t in pytree.tree_leaves(place.before) if _is_tensor(t)):
            raise CaptureError(
                f"{name}: it reads what an earlier call of it left in {place.path}, and writes there again\n"
                "  way out: pass that as an input and give it back as an output, or leave it out of "
                "the model's forward",
                code=Code.KEPT_STATE,
            )
    unknown = next((place for place in kept if place.new), None)
    if unknown is not None and first.why and not any(_is_tensor(x) and x.is_meta for x in leaves):
        raise CaptureError(
            f"{name}: it keeps a value in {unknown.path}, which was empty, and later calls may read it\n"
            "  way out: call the model once on inputs of this size before, model(x); then that place holds a value",
            code=Code.KEPT_STATE,
        )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _export(
    model: nn.Module,
    leaves: Sequence[Any],
    runs: Sequence[bool],
    spec: pytree.TreeSpec,
    first: FirstRun,
    held: HeldFast | None = None,
) -> GraphModule:
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    dynamic = ShapesCollection()
    for leaf, over in zip(leaves, runs, strict=True):
        if over:
            dynamic[leaf] = {0: Dim.AUTO}
    try:
        with torch.enable_grad():
            program = export(held or model, args, kwargs or None, dynamic_shapes=dynamic, strict=False)
            exported: GraphModule = program.module(check_guards=False)
    except Exception as error:
        raise not_captured(model, error, _readable(model, leaves, args, kwargs, held), not first.why) from error
    _no_vmap(model, exported)
    if held is not None:
        _no_writes(model, held, exported)
    return exported


def _readable(model: nn.Module, leaves: Sequence[Any], args: Any, kwargs: Any, held: HeldFast | None) -> list[str]:
    """The names of inputs whose values code may ask for: few whole numbers, beside the first tensor, not held yet."""
    first = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)), None)
    known = {first, *(held.held if held is not None else ())}
    names = input_names(model, args, kwargs)
    return [names[i][-1] for i, leaf in enumerate(leaves) if names[i] and is_small(leaf) and i not in known]


def _no_writes(model: nn.Module, held: HeldFast, exported: GraphModule) -> None:
    """Refuses a model that writes into a constant input, or into what it computed from one."""
    node = written_constant(exported, model)
    line = source_line(node) if node is not None else ""
    if node is not None or held.written():
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}: "
            f"{op_name(node) + ' writes' if node is not None else 'it writes'} into a value of its constant_inputs\n"
            + (f"  in the model: {line}\n" if line else "")
            + "  way out: write that line out of place, or name fewer inputs in constant_inputs",
            code=Code.NOT_TRACED,
        )


def _no_vmap(model: nn.Module, exported: GraphModule) -> None:
    """Refuses what torch.func.vmap left in the graph: values without memory of their own."""
    for node in exported.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and torch._C._functorch.is_batchedtensor(val):
            line = source_line(node)
            raise CaptureError(
                f"torch.export cannot capture {type(model).__name__}: {op_name(node)} runs inside torch.func.vmap\n"
                + (f"  in the model: {line}\n" if line else "")
                + "  way out: write that line without vmap, or give the part of the model that it is not in",
                code=Code.NOT_TRACED,
            )


def _fixed_batch(exported: GraphModule, runs: Sequence[bool]) -> bool:
    """Whether the model's own code made the number of samples a constant."""
    values = [n.meta.get("val") for n in exported.graph.find_nodes(op="placeholder")]
    return any(
        over and isinstance(val, torch.Tensor) and expr(val.shape[0]).is_Integer
        for val, over in zip(values, runs, strict=True)
    )


def _flat(exported: GraphModule) -> GraphModule:
    """The same graph without export's input checks and nesting; the handle does both."""
    codegen: Any = exported.graph._codegen
    info = codegen.pytree_info
    exported.graph.set_codegen(torch.fx.graph.CodeGen())
    gm = GraphModule(exported, exported.graph, type(exported).__name__)
    OUT_SPEC.put(gm, info.out_spec)
    FIXED_BATCH.put(gm, FIXED_BATCH.get(exported) or 0)
    return gm
