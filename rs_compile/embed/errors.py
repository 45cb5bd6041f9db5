"""What `embed` refuses."""

from __future__ import annotations

from passes.graph.base import CompileError
from passes.graph.codes import Code


class EmbedError(CompileError, ValueError):
    """A source, an output or an option that cannot be followed; says what to give instead."""

    family = Code.PICTURES
