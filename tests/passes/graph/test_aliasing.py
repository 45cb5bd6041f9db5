"""What may share memory with what: asking must not change what is known of the graph."""

from __future__ import annotations

import pytest
import torch
from graphs import aten, first_input, graph_of
from torch import Tensor
from torch._ops import OpOverload

from passes.graph.aliasing import FRESH, Memory
from passes.graph.layout import expr


def test_the_batch_stays_symbolic():
    """Interpolation, a composite op, is replayed on fake values, and its own code fixes every size."""
    gm = graph_of(lambda x: torch.nn.functional.interpolate(x, scale_factor=2))
    Memory(gm.graph)
    assert not expr(first_input(gm).meta["val"].shape[0]).is_Integer


def calls(op: OpOverload, dtype: torch.dtype) -> list[tuple[tuple[Tensor, ...], tuple[object, ...]]]:
    """Tensors and further arguments of calls in which a result could be an input: zeros, ones, single entries."""
    one, nothing = torch.ones(1, 1, 1, dtype=dtype), torch.zeros(0, 1, 1, dtype=dtype)
    eye = torch.eye(2, dtype=dtype)
    name = op._schema.name.removeprefix("aten::")
    if name in ("softmax", "_softmax", "_safe_softmax"):
        more: tuple[object, ...] = (-1, False) if name == "_softmax" else (-1, dtype)
        return [((x,), more) for x in (one, nothing, eye)]
    if name in ("layer_norm", "rms_norm"):
        return [((x,), ([1],)) for x in (one, nothing)]
    if name.startswith("conv"):
        size = int(name[4])
        same = (None, [1] * size, "same") if op._overloadname == "padding" else ()
        return [((one.reshape((1,) * (size + 2)), one.reshape((1,) * (size + 2))), same)]
    if name == "scaled_dot_product_attention":
        return [((x[None], x[None], x[None]), ()) for x in (one, nothing)]
    if name == "addmm":
        return [((torch.zeros_like(eye), eye, eye), ())]
    if name == "_int_mm":
        ones = torch.ones(32, 32, dtype=torch.int8)
        return [((ones, ones), ())]
    return [((eye, eye), ())] if name == "mm" else [((eye, eye), ()), ((one, one[0]), ()), ((nothing, one[0]), ())]


@pytest.mark.parametrize("op", sorted(FRESH, key=str), ids=str)
def test_what_is_called_fresh_shares_nothing(op: OpOverload) -> None:
    for dtype in (torch.float32, torch.float64):
        for tensors, more in calls(op, dtype):
            result = op(*tensors, *more)
            result = result[0] if isinstance(result, tuple) else result
            held = [t.untyped_storage()._cdata for t in tensors]
            assert result.untyped_storage()._cdata not in held


def test_other_composite_ops_are_asked() -> None:
    gm = graph_of(lambda x: torch.einsum("bnc->bcn", x))
    [einsum] = gm.graph.find_nodes(op="call_function", target=aten.einsum.default)
    assert first_input(gm) in Memory(gm.graph).members(einsum)
