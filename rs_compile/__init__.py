"""Makes pretrained PyTorch vision models faster without training: `rs_compile.optimize(model, schedule)`."""

import passes as _passes

if getattr(_passes, "PROJECT", None) != "rs_compile":
    raise ImportError(
        f"another package named 'passes' shadows rs_compile's own: {getattr(_passes, '__file__', None)}; "
        "remove or rename it, or put rs_compile's site-packages before it on sys.path"
    )

from passes.base import CompileError, Refusal
from passes.capture import CaptureError
from passes.cost import register_cost
from passes.restore import TokenOutput
from passes.rules import register_token_rule
from rs_compile.errors import ScheduleError
from rs_compile.grid_prune import GridPrune
from rs_compile.optimize import OptimizedModel, explain, optimize, plan
from rs_compile.report import Explanation, Report
from rs_compile.schedule import Schedule
from rs_compile.signature import InputError
from rs_compile.visualize import ScoreMaps, score_maps

__all__ = [
    "CaptureError",
    "CompileError",
    "Explanation",
    "GridPrune",
    "InputError",
    "OptimizedModel",
    "Refusal",
    "Report",
    "Schedule",
    "ScheduleError",
    "ScoreMaps",
    "TokenOutput",
    "explain",
    "optimize",
    "plan",
    "register_cost",
    "register_token_rule",
    "score_maps",
]
