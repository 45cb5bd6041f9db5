"""Makes pretrained PyTorch vision models faster without training: `rs_compile.optimize(model, schedule)`."""

import sys as _sys
from importlib import import_module as _import_module
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING, Any

import passes as _passes

if getattr(_passes, "PROJECT", None) != "rs_compile":
    raise ImportError(
        f"another package named 'passes' shadows rs_compile's own: {getattr(_passes, '__file__', None)}; "
        "remove or rename it, or put rs_compile's site-packages before it on sys.path"
    )

if TYPE_CHECKING:
    from passes.axes.rules import register_token_rule
    from passes.capture.capture_errors import CaptureError
    from passes.graph.base import CompileError, Refusal, ScheduleError
    from passes.graph.cost import register_cost
    from passes.sites.attention_scores import AttentionEntropy, ClassAttention, MeanAttention, ZeroTPrune
    from passes.sites.grid_prune import GridPrune
    from passes.sites.importance import Lowest, Random, Score, Shift, TopViM
    from passes.sites.mergers import DiffRate, Merger, PiToMe, Stream, ToMe, VidTLDR, Ward
    from passes.sites.restore import TokenOutput
    from rs_compile.embed import Embedding, EmbedError, embed
    from rs_compile.errors import OutputError, TowerError
    from rs_compile.explain import explain
    from rs_compile.exporting import ExportError, Info, export, info
    from rs_compile.optimize import OptimizedModel, optimize
    from rs_compile.planning import plan
    from rs_compile.report import Explanation, Report
    from rs_compile.schedule import Schedule
    from rs_compile.search import SearchError, SearchResult, search
    from rs_compile.signature import InputError
    from rs_compile.towers import optimize_tower
    from rs_compile.visualize import ScoreMaps, score_maps

__all__ = [
    "AttentionEntropy",
    "CaptureError",
    "ClassAttention",
    "CompileError",
    "DiffRate",
    "EmbedError",
    "Embedding",
    "Explanation",
    "ExportError",
    "GridPrune",
    "Info",
    "InputError",
    "Lowest",
    "MeanAttention",
    "Merger",
    "OptimizedModel",
    "OutputError",
    "PiToMe",
    "Random",
    "Refusal",
    "Report",
    "Schedule",
    "ScheduleError",
    "Score",
    "ScoreMaps",
    "SearchError",
    "SearchResult",
    "Shift",
    "Stream",
    "ToMe",
    "TokenOutput",
    "TopViM",
    "TowerError",
    "VidTLDR",
    "Ward",
    "ZeroTPrune",
    "embed",
    "explain",
    "export",
    "info",
    "optimize",
    "optimize_tower",
    "plan",
    "register_cost",
    "register_token_rule",
    "score_maps",
    "search",
]

# where each name lives; imported when it is first asked for, because sympy and torch.export take half a second
_HOMES = {
    "passes.graph.base": ("CompileError", "Refusal", "ScheduleError"),
    "passes.capture.capture_errors": ("CaptureError",),
    "passes.graph.cost": ("register_cost",),
    "passes.sites.grid_prune": ("GridPrune",),
    "passes.sites.attention_scores": ("AttentionEntropy", "ClassAttention", "MeanAttention", "ZeroTPrune"),
    "passes.sites.importance": ("Lowest", "Random", "Score", "Shift", "TopViM"),
    "passes.sites.mergers": ("DiffRate", "Merger", "PiToMe", "Stream", "ToMe", "VidTLDR", "Ward"),
    "passes.sites.restore": ("TokenOutput",),
    "passes.axes.rules": ("register_token_rule",),
    "rs_compile.embed": ("EmbedError", "Embedding", "embed"),
    "rs_compile.errors": ("OutputError", "TowerError"),
    "rs_compile.explain": ("explain",),
    "rs_compile.exporting": ("ExportError", "Info", "export", "info"),
    "rs_compile.optimize": ("OptimizedModel", "optimize"),
    "rs_compile.planning": ("plan",),
    "rs_compile.report": ("Explanation", "Report"),
    "rs_compile.schedule": ("Schedule",),
    "rs_compile.search": ("SearchError", "SearchResult", "search"),
    "rs_compile.signature": ("InputError",),
    "rs_compile.towers": ("optimize_tower",),
    "rs_compile.visualize": ("ScoreMaps", "score_maps"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


class _Package(_ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(_import_module(_HOME[name]), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # `import rs_compile.optimize` would put the module in the place of the function
        if not (name in _HOME and isinstance(value, _ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


_sys.modules[__name__].__class__ = _Package
