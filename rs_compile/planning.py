"""What `optimize` would make of a model, with nothing compiled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from passes.graph.base import PassResult
from rs_compile.compiling import copied
from rs_compile.errors import named
from rs_compile.optimize import OptimizedModel, optimize
from rs_compile.report import Report
from rs_compile.schedule import Schedule


def plan(
    model: nn.Module,
    schedule: Schedule | Mapping[int, float],
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


def plans(handles: Sequence[OptimizedModel], args: Any, kwargs: Mapping[str, Any] | None = None) -> Iterator[Report]:
    """`plan` for several handles of one model, which is captured once for all.

    Args:
        handles: of the same model, uncompiled (backend "eager").
        args: see `explain`.
        kwargs: see `explain`.

    Yields:
        The report of each, in order.
    """
    args, kwargs = args if isinstance(args, tuple) else (args,), dict(kwargs or {})
    prepared: dict[Any, PassResult] = {}
    for handle in handles:
        with named("plan"):
            call = handle._read(args, kwargs)
            case = (handle._lowers, call.constant)
            if case not in prepared:
                prepared[case] = handle._prepare(call)
            found = handle._plan(call, partial(copied, prepared[case]))
            handle._keep(handle._state(), call, found)
            handle.__dict__["_last"] = found
            report = handle.report()
        yield report
