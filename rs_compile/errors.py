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


def told(error: Exception) -> tuple[str, int]:
    """An error of a command in one line, with the way out, and the exit code: 2 where the user can mend it, else 1."""
    if isinstance(error, torch._dynamo.exc.BackendCompilerFailed | torch._inductor.exc.InductorError):
        text = (
            f"torch.compile's backend failed: {first_line(error)}; way out: Inductor needs a C++ compiler (and Triton "
            "on a GPU); install one (`rs-compile doctor` says what is here), or pass --backend eager"
        )
        return text, 2
    if isinstance(error, CompileError):
        return " ".join(line.strip() for line in str(error).splitlines()), 2
    if isinstance(error, _MACHINE):
        return f"out of memory: {first_line(error)}; way out: a smaller --batch-size or --limit", 2
    return f"{type(error).__name__}: {first_line(error)}; way out: --debug shows where; please report it with that", 1


def first_line(error: BaseException) -> str:
    """What an exception says, or its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
