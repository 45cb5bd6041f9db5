"""A search as a picture: drift against multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rs_compile.search.pictures import SearchError
from rs_compile.search.result import Row, SearchResult

KINDS = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Before minutes of work, not after them.

    Raises:
        SearchError: no picture can be drawn there.
    """
    if path.suffix.lower() not in KINDS:
        raise SearchError(f"{path} is no {', '.join(KINDS)} file; give one")
    if not path.absolute().parent.is_dir():
        raise SearchError(f"{path} is in no folder that exists; give one that does")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SearchError("drawing needs matplotlib; pip install 'rs-compile[visualize]'") from None


def draw(result: SearchResult, path: Path) -> None:
    """One mark a schedule, a colour a method; the front as a line, the winner as a star; filled where held out.

    Raises:
        SearchError: see `check`.
    """
    check(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axis = figure.subplots()
    for i, method in enumerate(dict.fromkeys(row.method for row in result.rows)):
        rows = [r for r in result.rows if r.method == method and r.drift is not None]
        axis.plot(*_points(result, rows), "o", mfc="none", color=f"C{i % 10}", label=method)
        held = [r for r in rows if r.held_drift is not None]
        costs, drifts = _points(result, held)[0], [r.held_drift or 0.0 for r in held]
        axis.errorbar(costs, drifts, [r.held_error or 0.0 for r in held], fmt="s", color=f"C{i % 10}", ms=5)
    axis.plot(*_points(result, result.front), "-", color="0.6", lw=1, zorder=0)
    axis.plot(*_points(result, [result.winner]), "*", color="k", ms=14, mfc="none")
    axis.set(xlabel="share of the dense model's multiply-accumulates", ylabel=result.metric, yscale="log")
    axis.set_title(
        f"{result.settings['model']}: {result.target}; rings searched on, squares held out", fontsize="medium"
    )
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)


def _points(result: SearchResult, rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [r.macs / result.macs_dense for r in rows], [r.drift or 0.0 for r in rows]
