"""A search as a picture: drift against multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from passes.graph.codes import Code
from rs_compile.search.pictures import SearchError
from rs_compile.search.rows import Row

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
    if find_spec("matplotlib") is None:
        raise SearchError("drawing needs matplotlib; pip install matplotlib", code=Code.MISSING)


def draw(
    path: Path, title: str, metric: str, macs_dense: int, rows: Sequence[Row], front: Sequence[Row], winner: Row
) -> None:
    """One mark a schedule, a colour a method; the front as a line, the winner as a star.

    Raises:
        SearchError: see `check`.
    """
    check(path)
    from matplotlib.figure import Figure

    def points(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
        return [r.macs / macs_dense for r in rows], [r.drift or 0.0 for r in rows]

    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axis = figure.subplots()
    for i, method in enumerate(dict.fromkeys(row.method for row in rows)):
        ran = [r for r in rows if r.method == method and r.drift is not None]
        axis.plot(*points(ran), "o", mfc="none", color=f"C{i % 10}", label=method)
        held = [r for r in ran if r.held_drift is not None]
        drifts, errors = [r.held_drift or 0.0 for r in held], [r.held_error or 0.0 for r in held]
        axis.errorbar(points(held)[0], drifts, errors, fmt="s", color=f"C{i % 10}", ms=5)
    axis.plot(*points(front), "-", color="0.6", lw=1, zorder=0)
    axis.plot(*points([winner]), "*", color="k", ms=14, mfc="none")
    axis.set(xlabel="share of the dense model's multiply-accumulates", ylabel=metric, yscale="log")
    axis.set_title(title, fontsize="medium")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)
