"""Why a model cannot be captured, in words, each with the way out that fits."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.capture.first_run import outputs_of
from passes.graph.base import CompileError
from passes.graph.codes import Code

_log = logging.getLogger(__name__)
_TORCH, _HERE = os.path.dirname(torch.__file__), os.path.dirname(__file__)
_LONGEST = 20  # lines of torch's own message; more (a graph) go to the log

_DATA = "make that line independent of the data, or give the part of the model that it is not in"
_TRACED = "the model runs, so write that line with ops that torch.export traces, or give the part that it is not in"
_UNTRIED = (
    "where model(x) raises the same, call it with other inputs; else write that line with ops that torch.export "
    "traces, or give the part of the model that it is not in"
)
_OWN = "model(x) raises the same: check the number, the sizes and the dtypes of the inputs against what it is made for"
_KNOWN_OUTPUTS = (
    "call it so that it does not return that (a cache is usually left out by use_cache=False), "
    "or register the class with torch.utils._pytree.register_pytree_node"
)
_SWAPPED = (
    "it moves or casts a layer's own weights while it runs, which torch.export cannot record",
    "cast the model before (model.to(dtype)) and take that line out of its forward",
)


class CaptureError(CompileError):
    """The model does not run on the inputs, or torch.export cannot capture it; the message names the model's line."""

    family = Code.NOT_TRACED


def check_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses arguments that the model's forward does not take, and parameters that are none.

    Raises:
        CaptureError: there are such.
    """
    name = type(model).__name__
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        text = f"{name}.forward takes {signature}: {error}"
        raise CaptureError(
            f"{text}\n  way out: call it with these arguments, as the model itself", code=Code.INPUTS
        ) from error
    for module_name, module in model.named_modules():
        for key, value in module._parameters.items():
            if value is not None and not isinstance(value, nn.Parameter):
                raise CaptureError(
                    f"the parameter {'.'.join(filter(None, (module_name, key)))} of {name} is a plain tensor, as "
                    "torch.func.functional_call puts there, and a graph holds parameters\n"
                    "  way out: wrap each tensor as torch.nn.Parameter, or load them into a copy of the model",
                    code=Code.DOES_NOT_RUN,
                )


def check_loaded(model: nn.Module, leaves: Sequence[Any], not_run: str) -> None:
    """Refuses a model without values for inputs that have some.

    Args:
        not_run: why the model did not run on these inputs, "" where it did.

    Raises:
        CaptureError: parameters or buffers are on the meta device, and inputs are not.
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    tables = [*model.named_parameters(), *model.named_buffers()]
    empty = next((key for key, value in tables if value.is_meta), None)
    given = next((t.device for t in tensors if not t.is_meta), None)
    if empty is None or given is None:
        return
    text = f"{empty} of {type(model).__name__} is on the meta device, and the inputs are on {given}"
    if not_run:
        way_out = "explain and plan take inputs on the meta device as well, x.to('meta'); or load the weights first"
    else:
        text += "; hooks load it while the model runs, which torch.export cannot record"
        way_out = "load the whole model onto one device: without offloading, or its hooks removed"
    raise CaptureError(f"{text}\n  way out: {way_out}", code=Code.DOES_NOT_RUN)


def does_not_run(model: nn.Module, error: Exception, leaves: Sequence[Any], spec: pytree.TreeSpec) -> CaptureError:
    """The model itself raises: what it says, and what the inputs would have to be where that can be found by trying."""
    check_loaded(model, leaves, "it raises")
    way_out = next((w for w, changed in _other_inputs(model, leaves, spec) if _runs(model, *changed)), _OWN)
    given = ", ".join(_in_words(leaf) for leaf in leaves if isinstance(leaf, Tensor))
    return CaptureError(
        _text(f"{type(model).__name__} does not run on {given}: {_said(error)}", error, way_out), code=Code.DOES_NOT_RUN
    )


def _runs(model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec) -> bool:
    try:
        outputs_of(model, leaves, spec)
    except Exception:
        return False
    return True


def _other_inputs(
    model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec
) -> Iterator[tuple[str, tuple[list[Any], pytree.TreeSpec]]]:
    """Ways out, and the inputs that they lead to."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    kind = next((p for p in model.parameters() if p.is_floating_point()), None)
    if kind is not None and any(t.device != kind.device for t in tensors):
        moved = pytree.tree_map_only(Tensor, lambda t: t.to(kind.device), list(leaves))
        yield f'its parameters are on {kind.device}: pass x.to("{kind.device}")', (moved, spec)
    if kind is not None and any(t.dtype != kind.dtype for t in tensors):
        over = [isinstance(x, Tensor) and (x.is_floating_point() or x is tensors[0]) for x in leaves]
        cast = [leaf.to(kind.dtype) if one else leaf for leaf, one in zip(leaves, over, strict=True)]
        scaled = ", scaled as the model expects" if not tensors[0].is_floating_point() else ""
        yield f"its parameters are {kind.dtype}: pass x.to({kind.dtype}){scaled}", (cast, spec)
    args, kwargs = pytree.tree_unflatten(list(leaves), spec)
    stacks = [isinstance(a, list | tuple) and all(isinstance(t, Tensor) for t in a) for a in args]
    if any(stacks) and len({t.shape for t in tensors}) == 1:
        whole = [torch.stack(list(a)) if one else a for a, one in zip(args, stacks, strict=True)]
        yield (
            "pass one tensor [batch, ...] in place of the list, torch.stack(list)",
            pytree.tree_flatten((tuple(whole), kwargs)),
        )
    alone = pytree.tree_map_only(Tensor, lambda t: t[None], list(leaves))
    yield "add the batch dimension in front, x[None]", (alone, spec)


def not_captured(model: nn.Module, error: Exception, constants: Sequence[str], ran: bool) -> CaptureError:
    """torch.export gives up.

    Args:
        constants: inputs whose values the model's code may ask for.
        ran: whether the model itself runs on these inputs.
    """
    said = _said(error)
    reason, way_out, code = said, _TRACED if ran else _UNTRIED, Code.NOT_TRACED
    if re.search("data.?dependent|unbacked", f"{type(error).__name__} {said}", re.IGNORECASE):
        named = "".join(f'"{name}", ' for name in constants).strip()
        fast = (
            f"pass constant_inputs=({named}): the graph then holds the value of such an input fast, "
            "and another value is another capture"
        )
        way_out, code = fast if constants else _DATA, Code.DATA_DEPENDENT
    if "Couldn't swap" in said:
        reason, way_out = _SWAPPED
    if found := re.search(r"<class '([\w.]+)'> in output", said):
        reason, way_out = f"it returns a {found[1]}, which torch.export does not know", _KNOWN_OUTPUTS
    return CaptureError(
        _text(f"torch.export cannot capture {type(model).__name__}: {reason}", error, way_out), code=code
    )


def _said(error: Exception) -> str:
    """The first line of a message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _text(first: str, error: Exception, way_out: str) -> str:
    """A message: what, the model's line, the way out. What torch adds at length goes to the log."""
    text = str(error)
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', text)
    tb = error.__traceback__
    while tb is not None:
        code = tb.tb_frame.f_code
        frames.append((code.co_filename, str(tb.tb_lineno), code.co_name))
        tb = tb.tb_next
    # neither torch's own frames, nor generated code, nor the capture's
    where = next((f for f in reversed(frames) if not f[0].startswith((_TORCH, "<", _HERE))), None)
    lines = text.splitlines()
    if len(lines) > _LONGEST:
        _log.info("%s", text)
        error.args = ("\n".join([*lines[:_LONGEST], f"({len(lines) - _LONGEST} more lines in the log of {__name__})"]),)
    place = [f"  in the model: {where[0]}, line {where[1]}, in {where[2]}"] if where else []
    return "\n".join([first, *place, f"  way out: {way_out}"])


def _in_words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
