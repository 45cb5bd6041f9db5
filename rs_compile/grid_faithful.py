"""Whether the graph behind a cut is the model on the smaller map: the model runs once more, handed that map on its way.

What a model computes from the size of a map (a kernel, coordinates, a divisor, which path it takes) is a plain
number in the graph, and no property of the graph would tell. So the model's own code runs on two samples, the cut map
[B, C, H', W'] in the place of the whole one where one of its functions returns that, and what comes out is held
against the graph's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from passes.axes.grid import RESTORE, WAY_OUT
from passes.capture.first_run import outputs_of
from passes.graph.base import Refusal
from passes.graph.codes import Code
from passes.graph.splice import ORIGIN
from passes.sites.grid_cut import CUTS, MAPS
from passes.sites.grid_select import take
from rs_compile.faithful import (
    first_samples,
    gap,
    hindrance,
    tolerance_of,
    values_of,
    where_apart,
    wrong_outputs,
)


@dataclass(frozen=True)
class _Cut:
    """A stage's map [B, C, H, W], what was left of it [B, C, H', W'], and the rows and columns that stayed."""

    stage: int
    whole: Tensor
    short: Tensor
    rows: Tensor
    columns: Tensor

    def alike(self, value: Any) -> Any:
        """The same of another map of that size, anything else as it is."""
        is_map = isinstance(value, Tensor) and value.dim() == 4 and value.shape[2:] == self.whole.shape[2:]
        return take(value, self.rows, self.columns) if is_map and len(value) in (1, len(self.rows)) else value


def check_cuts(
    model: nn.Module, gm: GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any], leaves: Sequence[Any]
) -> str:
    """Runs the rewritten graph and, on the maps that it cut, the model, and holds their outputs against each other.

    A map among the outputs is compared as it was before it was given back at full size. A map from before a cut that
    the model's code joins with what is behind it is cut alike, as in the graph.

    Args:
        model, args, kwargs: what was captured.
        gm: the graph after the cuts.
        leaves: the flat inputs.

    Returns:
        Why they were not compared, "" where they were and agree, or where the captured graph could not be either.

    Raises:
        Refusal: they do not agree.
    """
    if not MAPS.get(gm) or hindrance(model, gm, leaves):
        return ""
    if any(_draws(node) for node in gm.graph.nodes):
        return "the model draws random numbers"
    spec = pytree.tree_structure((tuple(args), dict(kwargs)))
    whole, leaves = leaves, first_samples(leaves, gm)
    try:
        outputs_of(model, leaves, spec)
    except Exception:  # not every number of samples runs
        leaves = whole
    cuts, got = _run(gm, leaves)
    tolerance = tolerance_of([*model.parameters(), *leaves, *got])
    at: list[int] = []
    for i in range(len(cuts)):
        search = _Handed(cuts[:i], at, cuts[i].whole)
        _, why = _tried(partial(outputs_of, model, leaves, spec, search))
        if why or search.gap > tolerance**1.5:  # the ops are the same; another block's map may be near as well
            return why or f"no function that the model calls returns the map of stage {cuts[i].stage}"
        at.append(search.place)
    handed = _Handed(cuts, at)
    wanted, why = _tried(partial(outputs_of, model, leaves, spec, handed))
    if why or handed.unread:
        return why or "what the model reads is not what its function returns"
    if len(got) == len(wanted):
        pairs = [_alike(a, b, cuts) for a, b in zip(got, wanted, strict=True)]
        got, wanted = [a for a, _ in pairs], [b for _, b in pairs]
    wrong = wrong_outputs(got, wanted, tolerance)
    if wrong:
        agrees, differs = where_apart(model, gm, leaves, spec, tolerance, _Handed(cuts, at))
        since = f"; up to {agrees.name} they agree" if agrees is not None else ""
        raise Refusal(
            f"the model itself does something else on the smaller map: {wrong}{since}; what its code computes from the "
            "size of the map is a fixed number here",
            differs,
            f"{WAY_OUT}; optimize(..., verify=False) takes the graph as it is",
            code=Code.FIXED_GRID,
        )
    return ""


def _draws(node: Node) -> bool:
    """Whether an op of the model's own draws random numbers; attention without dropout only says so."""
    if not isinstance(node.target, torch._ops.OpOverload) or ORIGIN.get(node) == "score":
        return False
    return torch.Tag.nondeterministic_seeded in node.target.tags and "attention" not in str(node.target)


def _run(gm: GraphModule, leaves: Sequence[Any]) -> tuple[list[_Cut], list[Any]]:
    """The cuts that something reads, and the outputs, maps before they were given back at full size."""
    (returned,) = gm.graph.output_node().args
    sources = [_before_restored(n) for n in pytree.tree_leaves(returned)]
    nodes = {i: (*MAPS.of(gm)[i], *CUTS.of(gm)[i]) for i in sorted(MAPS.of(gm))}
    there = set(gm.graph.nodes)
    nodes = {i: of for i, of in nodes.items() if there.issuperset(of)}
    found = values_of(
        gm, leaves, {n for n in (*sources, *(n for of in nodes.values() for n in of)) if isinstance(n, Node)}
    )
    cuts = [_Cut(i, *(found[n] for n in of)) for i, of in nodes.items()]
    return cuts, [found[n] if isinstance(n, Node) else n for n in sources]


def _before_restored(value: Any) -> Any:
    while isinstance(value, Node) and ORIGIN.get(value) == RESTORE:
        value = value.args[0]
    return value


def _alike(got: Any, wanted: Any, cuts: Sequence[_Cut]) -> tuple[Any, Any]:
    """An output of each side; what the graph gives from a whole map is cut, and left out where that is no such map."""
    for cut in cuts:
        if isinstance(got, Tensor) and isinstance(wanted, Tensor) and got.shape != wanted.shape:
            got = cut.alike(got)
    tensors = isinstance(got, Tensor) and isinstance(wanted, Tensor)
    return (got, wanted) if tensors and got.shape == wanted.shape else (None, None)


def _tried(run: Callable[[], list[Any]]) -> tuple[list[Any], str]:
    try:
        return run(), ""
    except Exception as error:  # whatever the model's code raises on another size than it was made for
        return [], f"on it the model raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"


class _Handed(TorchFunctionMode):
    """Hands the model smaller maps in the places of whole ones, by how many functions it has called.

    Args:
        cuts: in order.
        at: for each, the count at the function that returns the whole map.
        sought: the function that returns this one is to be found.
    """

    def __init__(self, cuts: Sequence[_Cut], at: Sequence[int], sought: Tensor | None = None) -> None:
        super().__init__()
        self._cuts, self._at, self._sought = cuts, list(at), sought
        self._count = self._done = 0
        self._given: list[Tensor] = []
        self._read: set[int] = set()
        self.gap, self.place = float("inf"), -1

    @property
    def unread(self) -> bool:
        """Whether a map that was handed over is read by nothing."""
        return len(self._read) < len(self._cuts)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._count += 1
        count, kwargs = self._count, kwargs or {}
        done = self._cuts[: self._done]
        for leaf in pytree.tree_leaves((args, kwargs)) if done else ():
            self._read |= {i for i, given in enumerate(self._given) if leaf is given}
        try:
            out = func(*args, **kwargs)
        except RuntimeError:
            for cut in done:
                args, kwargs = pytree.tree_map(cut.alike, (args, kwargs))
            if not done:
                raise
            out = func(*args, **kwargs)
        if self._done < len(self._cuts) and count == self._at[self._done]:
            self._given.append(self._cuts[self._done].short.clone())  # the model may write into it
            self._done += 1
            return self._given[-1]
        sought = self._sought
        if sought is not None and isinstance(out, Tensor) and (out.shape, out.dtype) == (sought.shape, sought.dtype):
            apart = gap(out, sought)
            if apart < self.gap:
                self.gap, self.place = apart, count
        return out
