"""The one list of elementwise ops that the rules for tokens and for rows and columns share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import aten, graph_of
from torch import Tensor
from torch.nn import functional as F

from passes.axes.rules import registry
from passes.graph.ops import ELEMENTWISE, SHAPED_LIKE, elementwise

ARGS: dict[str, tuple[Any, ...]] = {  # behind the first input, where it needs any
    **dict.fromkeys(["dropout", "native_dropout", "feature_dropout", "alpha_dropout"], (0.5, False)),
    "feature_alpha_dropout": (0.5, False),
    "to": (torch.float64,),
    "masked_fill": (torch.eye(3, 4) > 0, 2.0),
}
TWO = {
    *("type_as", "subtract", "rsub", "multiply", "divide", "true_divide", "floor_divide", "greater", "greater_equal"),
    *("less", "less_equal", "not_equal", "isclose", "arctan2", "complex", "polar"),
    *("special_gammainc", "special_gammaincc", "special_xlogy"),
}
BITS = ("__and__", "__or__", "__xor__")
FIRST = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05  # in every op's domain
SECOND = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) + 0.5


@pytest.mark.parametrize("packet", [p for p in ELEMENTWISE if p is not aten.bernoulli], ids=str)
def test_each_entry_is_made_of_its_own(packet: Any) -> None:
    name = packet.__name__
    given: tuple[Any, ...] = (FIRST, *ARGS.get(name, ()))
    if name in TWO:
        given = (FIRST, SECOND)
    elif name in BITS:
        given = (FIRST > 0.5, SECOND > 1.0)
    elif name == "where":
        given = (FIRST > 0.5, FIRST, SECOND)
    elif name in ("imag", "_conj"):
        given = (torch.complex(FIRST, SECOND),)
    elif name == "arccosh":
        given = (FIRST + 1,)

    def run(at: tuple[Any, ...]) -> Tensor:
        out = packet(*(a[at] if isinstance(a, Tensor) else a for a in given))
        return out[0] if isinstance(out, tuple) else out

    whole = run((slice(None), slice(None)))
    assert whole.shape == (3, 4)
    for i, j in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        torch.testing.assert_close(run((slice(i, i + 1), slice(j, j + 1)))[0, 0], whole[i, j], equal_nan=True)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{f.__name__: f for f in (F.relu6, F.hardtanh, F.hardsigmoid, F.hardswish, F.selu, F.celu, F.elu, F.mish, F.silu)},
    **{f.__name__: f for f in (F.gelu, F.softplus, F.leaky_relu, F.softsign, F.tanhshrink, F.logsigmoid, F.rrelu)},
    "softshrink": lambda x: F.softshrink(x),
    "hardshrink": lambda x: F.hardshrink(x),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "masks": lambda x: x * ((x > 0) & (x < 1) | (x > 2) ^ (x > 3)),
    "complex": lambda x: (torch.polar(x, x).conj() * torch.complex(x, x)).real,
}


@pytest.mark.parametrize("f", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_have_a_rule_in_both_tables(f: Callable[[Tensor], Tensor]) -> None:
    ops = [n.target for n in graph_of(f, torch.randn(2, 3)).graph.nodes if n.op == "call_function"]
    assert ops and all(elementwise(op) for op in ops)
    assert all(registry.rule_for(op) and registry.rule_for(op, registry.GRID_RULES) for op in ops)


def test_what_is_not_elementwise() -> None:
    others = (aten.relu_.default, aten.softmax.int, aten.prelu.default, aten.isin.Tensor_Tensor, torch.relu)
    made = [getattr(p, p.overloads()[0]) for p in SHAPED_LIKE]
    assert not any(elementwise(op) for op in (*others, *made))
