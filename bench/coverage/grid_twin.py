"""Rows and columns cut by hand on any CNN: one map of its eager run is made smaller, and the model itself goes on.

The compiler says which map and shortcut (a stage); the scores, the choice, the cut and all that follows are by hand
here or the model's own code. Shapes: B samples, C channels, H rows, W columns. Blocks may hold their maps with channels
last or cells in one dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

CLOSE = 1e-9  # of the largest value: the map is found again by its values, in float64


def cut_by_hand(
    call: Callable[[], Any], stage: Tensor, after: Tensor, shortcut: Tensor, rows: int, columns: int
) -> Any:
    """What the model returns when the lines of least representation shift leave behind a stage.

    Args:
        call: runs the model.
        stage: the map [B, C, H, W] that it computes there.
        after: the last block's sum.
        shortcut: what the stage added to, the same shape.
        rows, columns: how many leave.

    Raises:
        LookupError: no function in the model's Python code returns that map.
        Exception: whatever the model raises on a smaller map.
    """
    change = (after - shortcut).float()
    if change.dim() == 3 and change.shape[1] == stage[0, 0].numel():
        change = change.transpose(1, 2)  # [B, H * W, C]
    elif change.dim() == 4 and change.shape[2:] != stage.shape[2:]:
        change = change.permute(0, 3, 1, 2)  # [B, H, W, C]
    score = change.norm(dim=1).reshape(-1, *stage.shape[2:])  # [B, H, W]
    short = torch.stack(
        [one[:, _best(s.mean(1), rows)][:, :, _best(s.mean(0), columns)] for one, s in zip(stage, score, strict=True)]
    )
    with _Swap(stage, short) as swap:
        result = call()
    if not swap.done:
        raise LookupError("no function of the model returns the stage's map")
    return result


def same_shape(cut: Any, dense: Any) -> list[int]:
    """Places of the outputs that have their full shape after a cut and are no maps, which may round to it."""
    pairs = zip(pytree.tree_leaves(cut), pytree.tree_leaves(dense), strict=True)
    return [i for i, (a, b) in enumerate(pairs) if isinstance(a, Tensor) and a.shape == b.shape and not _is_map(b)]


def maps(cut: Any, dense: Any) -> list[int]:
    """Places of the outputs that are maps, [B, C, H, W], of whatever size after a cut."""
    pairs = zip(pytree.tree_leaves(cut), pytree.tree_leaves(dense), strict=True)
    return [i for i, (a, b) in enumerate(pairs) if isinstance(a, Tensor) and _is_map(b) and a.shape[:2] == b.shape[:2]]


def strays(full: Tensor, small: Tensor) -> float:
    """How far cells of a map [B, C, H, W] are from those of a smaller one at most, relative to its largest value.

    Of many cells every n-th is looked for.
    """
    a, b = (x.double().flatten(2).transpose(1, 2) for x in (full, small))
    a = a[:, :: max(1, a.shape[1] // 1024)]
    apart = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").amin(2)
    return (apart.max() / b.abs().max()).item()


def _is_map(value: Tensor) -> bool:
    return value.dim() == 4 and value.shape[2:].numel() > 1


def _best(score: Tensor, gone: int) -> Tensor:
    """Positions of all but the `gone` lowest scores, in order."""
    return score.argsort(descending=True, stable=True)[: len(score) - gone].sort().values


class _Swap(TorchFunctionMode):
    """Gives back another tensor where a function first returns the one sought."""

    def __init__(self, sought: Tensor, given: Tensor) -> None:
        super().__init__()
        self._sought, self._given = sought, given
        self._limit = CLOSE * sought.abs().max()
        self.done = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            self.done
            or not isinstance(out, Tensor)
            or out.shape != self._sought.shape
            or out.dtype != self._sought.dtype
        ):
            return out
        if (out - self._sought).abs().max() > self._limit:
            return out
        self.done = True
        return self._given
