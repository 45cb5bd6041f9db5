"""What the user-facing side refuses, beside the compiler's own `passes.graph.base.CompileError`."""

from __future__ import annotations

from passes.graph.base import CompileError


class ScheduleError(CompileError, ValueError):
    """A pruning schedule that cannot mean anything. The message names the value and what to write instead."""


class OutputError(CompileError, ValueError):
    """Outputs were asked for that the model does not return. The message lists those that it does."""
