"""What a handle refuses before it reads a call: models that are no Python code, and tools that look into calls."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as _modules

from passes.graph.base import Refusal, Skip
from passes.graph.codes import Code

_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")
_EXPORT = 'rs_compile.export(fast, inputs, "model.pt2"), or another file: .onnx, .xml, .pte'


def check_model(model: object, handle: type[nn.Module]) -> None:
    """Refuses what is not a model in Python code.

    Args:
        handle: the class of what `optimize` returns.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize takes a torch.nn.Module, not {type(model).__name__}; pass the model itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "the model was scripted or traced by torch.jit, and torch.export reads Python code; "
            "pass the module that it was made from"
        )
    if isinstance(model, handle):
        raise TypeError("the model is optimized already; optimize the original with the whole schedule")
    inside = next((name for name, inner in model.named_modules() if isinstance(inner, handle)), None)
    if inside is not None:
        raise TypeError(
            f"{inside!r} in the model is optimized already, and runs as it is; put the original in its place and "
            "optimize the whole, with the whole schedule"
        )


def refuse_watchers() -> None:
    """Refuses a call inside of what would record or change more, or less, than the model's own modules.

    Raises:
        Refusal: torch.jit.trace is following the call, or a global hook is registered.
    """
    if torch._C._get_tracing_state() is not None:
        raise Refusal("torch.jit.trace cannot follow an optimized model", None, _EXPORT, code=Code.SURROUNDED)
    for table in _GLOBAL:
        for hook in list(vars(_modules)[table].values()):
            if not (getattr(hook, "__module__", None) or "").startswith("torch."):  # torch's own count and watch
                raise Refusal(
                    f"a hook on all modules of the process, {getattr(hook, '__qualname__', type(hook).__name__)}, "
                    "would run on those of the compiler as well, and not on the model's",
                    None,
                    "remove it, or register it on the model's own modules with module.register_forward_hook, "
                    "which are captured with their hooks",
                    code=Code.SURROUNDED,
                )


def exporting() -> bool:
    """Whether torch.export is following the call."""
    # the flag is the whole process's, and other threads may serve meanwhile; modes are a thread's own
    return torch.compiler.is_exporting() and bool(torch._C._len_torch_dispatch_stack())


def not_exported() -> Refusal:
    """What is said to torch.export where nothing was rewritten yet: a capture inside of another one is impossible."""
    return Refusal(
        "torch.export cannot follow an optimized model through its first call with inputs like these",
        None,
        f"call it once before, in the same mode, fast(*inputs); or {_EXPORT}",
        code=Code.SURROUNDED,
    )


def hooked_inside(model: nn.Module) -> tuple[Skip, ...]:
    """What a user must know of forward hooks on modules inside, which run once, while the model is captured."""
    named = [name for name, m in model.named_modules() if name and (m._forward_hooks or m._forward_pre_hooks)]
    if not named:
        return ()
    more = f" and {len(named) - 1} more" if len(named) > 1 else ""
    reason = (
        f"hooks on modules inside ({named[0]}{more}) do not run at a call: what they compute is in the graph, what "
        "they collect is not"
    )
    return (Skip("hooks", reason, way_out="return those features from the model's forward"),)
