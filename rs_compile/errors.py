"""What the user-facing side refuses, beside the compiler's own `passes.graph.base.CompileError`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from passes.graph.base import CompileError
from passes.graph.codes import Code

_MACHINE = (MemoryError, torch.OutOfMemoryError)  # says nothing of the model; callers try a smaller batch
_BY_DATA = "GuardOnDataDependentSymNode"


class OutputError(CompileError, ValueError):
    """Outputs were asked for that the model does not return. The message lists those that it does."""

    family = Code.OUTPUTS


class TowerError(CompileError, ValueError):
    """A model has no vision tower that can be found, or several. The message says how to name one."""

    family = Code.NO_SUCH_PART


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Turns an exception that is not ours into a `CompileError`; the exception stays as its `__cause__`.

    Args:
        what: what was going on, "optimize".

    Raises:
        CompileError: whatever was raised; want of memory passes as it is.
    """
    try:
        yield
    except (CompileError, *_MACHINE):
        raise
    except Exception as error:
        first, *more = str(error).strip().splitlines() or [""]
        said = f"{type(error).__name__}: {first}" + (f" {more[0]}" if first.endswith(":") and more else "")
        if type(error).__name__ == _BY_DATA:
            code, text = Code.DATA_DEPENDENT, f"{what} cannot tell a size that depends on the data: {said}"
            way_out = "keep a fixed number of tokens in the model (argsort and a slice, topk), no boolean mask"
        else:
            code, text = Code.FAULT, f"{what} failed: {said}"
            way_out = "the model is as it was and runs unoptimized; please report this, with the traceback above"
        raise CompileError(f"{text}\n  way out: {way_out}", code=code) from error
