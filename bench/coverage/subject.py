"""What the coverage table is made of: one representative of an architecture family, with random weights, small."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from bench.tables.results import UsageError


@dataclass(frozen=True)
class Subject:
    """One model to try.

    Args:
        library: "timm", "transformers", "torchvision" or "open_clip".
        family: what it stands for, "vit_relpos".
        name: the model, as its library calls it.
        build: makes it, in eval mode; weights are drawn afterwards by the caller.
        inputs: makes its inputs for a number of samples: keyword arguments, or one tensor [B, ...].
        constant: inputs whose values the graph holds fast, `optimize(constant_inputs=...)`.
    """

    library: str
    family: str
    name: str
    build: Callable[[], nn.Module] = field(repr=False)
    inputs: Callable[[int], Tensor | Mapping[str, Any]] = field(repr=False)
    constant: tuple[str, ...] = ()


@cache
def subjects(library: str) -> list[Subject]:
    """The families of a library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        make: Callable[[], Iterable[Subject]] = import_module(f"bench.coverage.{library}_models").subjects
    except ImportError as error:
        raise UsageError(f"--library {library}: {error}; install it, or name others") from None
    return list(make())
