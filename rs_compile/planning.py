"""What `optimize` would make of a model, with nothing compiled."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from passes.graph.base import PassResult
from rs_compile.compiling import copied
from rs_compile.errors import named
from rs_compile.explain import explained
from rs_compile.optimize import OptimizedModel, optimize
from rs_compile.report import Explanation, Report
from rs_compile.schedule import Schedule
from rs_compile.signature import Call


def plan(
    model: nn.Module,
    schedule: Schedule | Mapping[int, float] | str | os.PathLike[str],
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    """What `optimize` would make of a model: captured and rewritten, nothing compiled.

    The model runs once, on two samples, so that what its code caches holds values when it is traced; in train mode
    and on the meta device it does not.

    Model and inputs may be on the meta device, so that a large model's GFLOPs need neither memory nor time.

    Args:
        model: see `optimize`.
        schedule: see `optimize`.
        args: see `explain`.
        kwargs: see `explain`.
        options: other arguments of `optimize`, except backend, mode, guard and verify; `method` names one to plan.

    Raises:
        CaptureError, Refusal: the model cannot be captured, or a rewrite cannot be proven right.
    """
    handle = optimize(model, schedule, backend="eager", **options)
    named = [getattr(handle, name) for name in handle._options.methods]
    return next(plans(named[:1] or [handle], args, kwargs))


class Planner:
    """Plans handles of one model one after another; the model is captured once for all.

    Args:
        args, kwargs: see `explain`.
        verify: whether the captured graph is held against the model, see `optimize`.
    """

    def __init__(self, args: Any, kwargs: Mapping[str, Any] | None = None, verify: bool = False) -> None:
        self._args = args if isinstance(args, tuple) else (args,)
        self._kwargs = dict(kwargs or {})
        self._verify = verify
        self._prepared: dict[Any, PassResult] = {}

    @named("plan")
    def plan(self, handle: OptimizedModel) -> Report:
        """What an uncompiled handle (backend "eager") makes of its model; it can then be called."""
        call = handle._read(self._args, self._kwargs)
        found = handle._plan(call, partial(copied, self._capture(handle, call)))
        handle._keep(handle._state(), call, found)
        handle.__dict__["_last"] = found
        return handle.report()

    @named("explain")
    def explain(self, handle: OptimizedModel) -> Explanation:
        """What the matcher finds in its model; see `rs_compile.explain`."""
        return explained(handle._model, self._capture(handle, handle._read(self._args, self._kwargs)))

    def _capture(self, handle: OptimizedModel, call: Call) -> PassResult:
        case = (handle._lowers, call.constant)
        if case not in self._prepared:
            self._prepared[case] = handle._prepare(call, self._verify)
        return self._prepared[case]


def plans(handles: Sequence[OptimizedModel], args: Any, kwargs: Mapping[str, Any] | None = None) -> Iterator[Report]:
    """`plan` for several handles of one model, which is captured once for all.

    Args:
        handles: of the same model, uncompiled (backend "eager").
        args: see `explain`.
        kwargs: see `explain`.

    Yields:
        The report of each, in order.
    """
    planner = Planner(args, kwargs)
    for handle in handles:
        yield planner.plan(handle)
