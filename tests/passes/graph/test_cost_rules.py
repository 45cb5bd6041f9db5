"""Each rule against counting one by one, and against what PyTorch runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode

from passes.graph.cost import Cost, count

aten = torch.ops.aten
SIZE = st.integers(1, 6)


def one_op(op: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Cost, Node]:
    """A graph of one op; a tuple of ints stands for a tensor of these sizes, a list for a list of them."""
    graph = Graph()
    values: dict[Node, Tensor] = {}

    def placeholder(value: Any) -> Any:
        if isinstance(value, list):
            return [placeholder(item) for item in value]
        if not isinstance(value, tuple):
            return value
        node = graph.placeholder(f"x{len(values)}")
        values[node] = node.meta["val"] = torch.empty(value, device="meta")
        return node

    args, kwargs = tuple(map(placeholder, args)), {key: placeholder(value) for key, value in kwargs.items()}
    node = graph.call_function(op, args, kwargs)
    node.meta["val"] = op(
        *torch.fx.node.map_arg(args, values.__getitem__), **torch.fx.node.map_arg(kwargs, values.__getitem__)
    )
    graph.output(node)
    return count(GraphModule({}, graph)), node


@given(m=SIZE, n=SIZE, k=SIZE, batch=st.lists(SIZE, max_size=2), vector=st.sampled_from(["", "a", "b", "ab"]))
def test_matmul_counts_every_product(m: int, n: int, k: int, batch: list[int], vector: str) -> None:
    a = (k,) if "a" in vector else (*batch, m, k)
    b = (k,) if "b" in vector else (*(1 for _ in batch), k, n)
    cost, node = one_op(aten.matmul.default, a, b)
    naive = sum(1 for _ in product(*map(range, node.meta["val"].shape), range(k)))
    assert cost.macs == cost.flops == naive


@given(m=SIZE, n=SIZE, k=SIZE, b=SIZE)
def test_every_spelling_of_a_matrix_product(m: int, n: int, k: int, b: int) -> None:
    args: Any
    for op, args in (
        (aten.mm.default, ((m, k), (k, n))),
        (aten.mm, ((m, k), (k, n))),
        (aten.addmm.default, ((n,), (m, k), (k, n))),
        (aten.linear.default, ((m, k), (n, k), (n,))),
        (aten.linear, ((m, k), (n, k))),
        (aten.tensordot.default, ((m, k), (n, k), [1], [1])),
        (aten.einsum.default, ("mk, kn", [(m, k), (k, n)])),
    ):
        assert one_op(op, *args)[0].macs == m * n * k, op
    for op, args in (
        (aten.bmm.default, ((b, m, k), (b, k, n))),
        (aten.baddbmm.default, ((b, 1, n), (b, m, k), (b, k, n))),
        (aten.addbmm.default, ((m, n), (b, m, k), (b, k, n))),
    ):
        assert one_op(op, *args)[0].macs == b * m * n * k, op
    assert one_op(aten.mv.default, (m, k), (k,))[0].macs == m * k
    assert one_op(aten.addmv.default, (m,), (m, k), (k,))[0].macs == m * k
    assert one_op(aten.dot.default, (k,), (k,))[0].macs == k


@st.composite
def einsums(draw: st.DrawFn, operands: int) -> tuple[str, list[tuple[int, ...]]]:
    size = {letter: draw(st.integers(2, 4)) for letter in "abcdE"}
    terms = [draw(st.lists(st.sampled_from("abcdE"), unique=True, max_size=4)) for _ in range(operands)]
    output = draw(st.lists(st.sampled_from(sorted(set().union(*terms)) or ["a"]), unique=True, max_size=3))
    output = [letter for letter in output if any(letter in term for term in terms)]
    equation = ",".join("".join(term) for term in terms) + draw(st.sampled_from(["", "->" + "".join(output)]))
    return equation, [tuple(size[letter] for letter in term) for term in terms]


@given(einsums(2))
def test_einsum_counts_every_product(einsum: tuple[str, list[tuple[int, ...]]]) -> None:
    equation, shapes = einsum
    left, right = equation.split("->")[0].split(",")
    output = equation.split("->")[1] if "->" in equation else "".join(set(left) ^ set(right))
    size = dict(zip(left + right, (*shapes[0], *shapes[1]), strict=True))
    loops = [i for i in size if i in output or (i in left and i in right)]
    naive = sum(1 for _ in product(*(range(size[i]) for i in loops)))
    sums = any(i not in output for i in loops)
    assert one_op(aten.einsum.default, equation, shapes)[0].macs == (naive if sums else 0)


@given(st.integers(1, 4).flatmap(einsums), st.none() | st.randoms(use_true_random=False))
def test_einsum_counts_what_pytorch_runs(einsum: tuple[str, list[tuple[int, ...]]], order: Any) -> None:
    equation, shapes = einsum
    path = None
    if order and len(shapes) > 1:  # contract in any order
        path = [i for left in range(len(shapes), 1, -1) for i in order.sample(range(left), 2)]
    with FlopCounterMode(display=False) as ran:
        aten.einsum.default(equation, [torch.empty(shape, device="meta") for shape in shapes], path=path)
    cost, _ = one_op(aten.einsum.default, equation, shapes, **({"path": path} if path else {}))
    assert cost.macs == ran.get_total_flops() // 2


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("bhqd,bhkd->bhqk", [(1, 2, 5, 4), (1, 2, 5, 4)], 2 * 5 * 5 * 4),
        ("...ij,...jk->...ik", [(3, 1, 5, 4), (2, 4, 6)], 3 * 2 * 5 * 4 * 6),
        ("...ij,jk", [(3, 5, 4), (4, 6)], 3 * 5 * 4 * 6),
        ("ij,j->ij", [(5, 4), (4,)], 0),
        ("bnc->bcn", [(2, 3, 4)], 0),
    ],
)
def test_einsum_spellings(equation: str, shapes: list[tuple[int, ...]], macs: int) -> None:
    assert one_op(aten.einsum.default, equation, shapes)[0].macs == macs


@given(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.data())
def test_convolution_counts_every_tap(rank: int, groups: int, data: st.DataObject) -> None:
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    x = (2, 2 * groups, *(data.draw(st.integers(4, 6)) for _ in range(rank)))
    weight = (3 * groups, 2, *kernel)
    cost, node = one_op(getattr(aten, f"conv{rank}d"), x, weight, None, [2] * rank, [1] * rank, [1] * rank, groups)
    out = node.meta["val"].shape
    assert cost.macs == prod(out) * 2 * prod(kernel)
    full = one_op(
        aten.convolution.default,
        x,
        weight,
        None,
        [2] * rank,
        [1] * rank,
        [1] * rank,
        False,
        [0] * rank,
        groups,
    )
    assert full[0].macs == cost.macs
    # the transposed convolution has the same taps, the other way round
    back = one_op(
        aten.convolution.default,
        tuple(out),
        weight,
        None,
        [2] * rank,
        [1] * rank,
        [1] * rank,
        True,
        [0] * rank,
        groups,
    )
    assert back[0].macs == cost.macs


@pytest.mark.parametrize(
    ("op", "options"),
    [
        (aten.scaled_dot_product_attention, ()),
        (aten.scaled_dot_product_attention.default, (None, 0.0, True)),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, ()),
        (aten._scaled_dot_product_flash_attention.default, ()),
        (aten._scaled_dot_product_efficient_attention.default, (None, False)),
        (aten._scaled_dot_product_cudnn_attention.default, (None, False)),
        (aten._scaled_dot_product_attention_math.default, ()),
    ],
)
def test_every_attention_kernel_counts_both_products(op: Any, options: tuple[Any, ...]) -> None:
    q, k = (2, 3, 5, 8), (2, 3, 7, 8)
    assert one_op(op, q, k, k, *options)[0].macs == 2 * 3 * 5 * 7 * (8 + 8)


def test_arguments_by_name() -> None:
    assert one_op(aten.linear.default, input=(5, 4), weight=(3, 4))[0].macs == 5 * 4 * 3
    assert one_op(aten.linear, (5, 4), weight=(3, 4))[0].macs == 5 * 4 * 3
    cost, _ = one_op(aten.layer_norm, (5, 4), normalized_shape=[4], weight=(4,))
    assert cost.flops == 5 * 5 * 4
