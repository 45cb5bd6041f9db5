"""Keys filled up to whole tiles of a matrix unit: where, and with the same result."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from generated import Config, GeneratedViT
from sdpa import graph
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

import passes.pipeline
from passes.attention.attention_kernel import AUTOCAST, kernels
from passes.device.pad_keys import PadKeys
from passes.graph.ops import SDPA, arguments
from passes.pipeline import prepare, prune
from passes.sites.steps import Prune

BF16 = (torch.bfloat16,)


def qkv(keys: int, dtype: torch.dtype = torch.bfloat16, queries: int = 64, groups: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, 8), *((2, 4 // groups, keys, 8),) * 2)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def keys(gm: GraphModule) -> list[int]:
    """How many each attention reads."""
    ops = gm.graph.find_nodes(op="call_function", target=SDPA)
    return [arguments(op)["key"].meta["val"].shape[2] for op in ops]


def by_hand(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float = 0.0, scale: float = 8**-0.5) -> Tensor:
    """softmax(qk * scale + bias) v in float64, key heads shared by groups of query heads."""
    key, value = (t.repeat_interleave(4 // t.shape[1], dim=1).double() for t in (key, value))
    return (query.double() @ key.mT * scale + bias).softmax(-1) @ value


MASKS: dict[str, Tensor] = {
    "bool, a row a sample": torch.arange(77) < torch.tensor([[4], [77]])[:, None, None],
    "float, all alike": torch.linspace(-2, 2, 77)[None, None, None],
    "float, rank 2": torch.linspace(-2, 2, 77)[None],
}


@pytest.mark.parametrize("count", [70, 77, 78, 79, 158, 383])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_filled_up_with_the_same_result(count: int, dtype: torch.dtype) -> None:
    tensors = qkv(count, dtype)
    result = PadKeys((dtype,))(graph(*tensors))
    assert (result.rewrites, keys(result.gm)) == (1, [16 * math.ceil(count / 16)])
    near = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(result.gm(*tensors)[0].double(), by_hand(*tensors), atol=near, rtol=near)
    [(_, choice)] = kernels(result.gm)
    assert choice.name == "flash"


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_keys_is_filled_up_too(name: str) -> None:
    tensors, mask = qkv(77, torch.float32), MASKS[name]
    gm = graph(*tensors, mask)
    result = PadKeys((torch.float32,))(gm)
    assert (result.rewrites, keys(result.gm)) == (1, [80])
    bias = torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask
    torch.testing.assert_close(result.gm(*tensors, mask)[0], by_hand(*tensors, bias).float())


def test_scale_and_shared_heads_stay() -> None:
    tensors = qkv(77, torch.float32, groups=2)
    gm = PadKeys((torch.float32,))(graph(*tensors, scale=0.7, enable_gqa=True)).gm
    assert keys(gm) == [80]
    torch.testing.assert_close(gm(*tensors)[0], by_hand(*tensors, scale=0.7).float())


@pytest.mark.parametrize(
    ("tensors", "options"),
    [
        (qkv(80), {}),
        (qkv(69), {}),  # a short last tile is cheap
        (qkv(61), {}),
        (qkv(397), {}),
        (qkv(77, queries=63), {}),
        (qkv(77, torch.float32), {}),
        (qkv(77, queries=77), {"is_causal": True}),
        (qkv(77), {"dropout_p": 0.1}),
        ([*qkv(77), torch.zeros(64, 77, dtype=torch.bfloat16)], {}),  # a row a query
        ([t[0] for t in qkv(77)], {}),
    ],
)
def test_left_where_it_does_not_pay(tensors: list[Tensor], options: dict[str, Any]) -> None:
    assert PadKeys(BF16)(graph(*tensors, **options)).rewrites == 0


def test_left_on_a_gpu_and_without_matrix_units() -> None:
    assert PadKeys(())(graph(*qkv(77))).rewrites == 0
    with FakeTensorMode():
        assert PadKeys(BF16)(graph(*(t.to("cuda") for t in qkv(77)))).rewrites == 0


def test_autocast_decides_the_dtype() -> None:
    gm = graph(*qkv(77, torch.float32))
    AUTOCAST.put(gm, {"cpu": torch.bfloat16})
    assert PadKeys(BF16)(gm).rewrites == 1


@pytest.mark.parametrize(("gone", "filled"), [(3, [82, 80]), (0, [82, 82])])
def test_behind_a_site_of_a_model(gone: int, filled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline fills up where tokens leave, as the machine's units say, and the model's result stays."""
    model = GeneratedViT(Config(grid=(9, 9))).eval()
    images = torch.randn(2, 3, 18, 18)

    def pruned(dtypes: tuple[torch.dtype, ...]) -> GraphModule:
        monkeypatch.setattr(passes.pipeline, "with_matrix_units", lambda: dtypes)
        return prune(prepare(model, (images,), {}, lower=True).gm, [Prune(0, lambda n: n - gone)]).gm

    plain, padded = pruned(()), pruned((torch.float32,))
    assert (keys(plain), keys(padded)) == ([82, 82 - gone], filled)
    torch.testing.assert_close(padded(images), plain(images))
