"""CUDA's flash attention by name: where, with what result, and why not.

On fake CUDA tensors; where a value is wanted, plain arithmetic stands in for the op, which runs on CUDA only.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from generated import Config, GeneratedViT
from sdpa import graph
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Interpreter

from passes.attention.attention_kernel import FLASH, KernelChoice, kernels
from passes.device.name_flash import NameFlash
from passes.graph.ops import SDPA, arguments
from passes.pipeline import prepare, prune
from passes.sites.steps import Prune

BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU torch itself is asked")


def qkv(
    width: int = 16, keys: int = 8, dtype: torch.dtype = torch.float16, device: str = "cuda", groups: int = 1
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 8, width), *((2, 4 // groups, keys, width),) * 2)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def targets(gm: GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.target in (SDPA, FLASH)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {}),
        ({"width": 256}, {}),
        ({"width": 20}, {}),
        ({}, {"is_causal": True}),
        ({}, {"dropout_p": 0.5}),
        ({"keys": 5}, {"scale": 0.3}),
        ({"groups": 2}, {"enable_gqa": True}),
    ],
)
@no_gpu
def test_named_where_it_is_legal(dtype: torch.dtype, given: dict[str, int], options: dict[str, Any]) -> None:
    with FakeTensorMode():
        gm = graph(*qkv(dtype=dtype, **given), **options)
        before = gm.graph.find_nodes(op="call_function", target=SDPA)[0].meta["val"]
    result = NameFlash()(gm)
    assert (result.rewrites, result.skips, targets(gm)) == (1, (), [FLASH])
    [(flash, choice)] = kernels(gm)
    assert choice == KernelChoice("flash", "named in the graph: aten._scaled_dot_product_flash_attention.default")
    assert all(node.meta["val"].shape[-1] % 8 == 0 for node in flash.args[:3])
    given_on = arguments(flash)
    assert [given_on["dropout_p"], given_on["is_causal"]] == [options.get(n, 0) for n in ("dropout_p", "is_causal")]
    width = given.get("width", 16)
    assert flash.kwargs["scale"] == options.get("scale", 1 / math.sqrt(width))  # not of the padded width
    [out] = gm.graph.output_node().args[0]
    assert (out.meta["val"].shape, out.meta["val"].dtype) == (before.shape, before.dtype)
    assert NameFlash()(gm).rewrites == 0


@pytest.mark.parametrize(
    ("given", "mask", "options", "reason"),
    [
        ({"dtype": torch.float32}, False, {}, "torch.float32 queries; flash takes float16 and bfloat16"),
        ({"width": 264}, False, {}, "264 channels a head, more than 256"),
        ({}, True, {}, "an explicit mask"),
        ({"keys": 5}, False, {"is_causal": True}, "causal, with 8 queries and 5 keys"),
    ],
)
@no_gpu
def test_elsewhere_the_op_keeps_its_choice(given: Any, mask: bool, options: Any, reason: str) -> None:
    with FakeTensorMode():
        tensors = qkv(**given)
        gm = graph(*tensors, *([torch.zeros(8, 8, device="cuda", dtype=torch.float16)] if mask else []), **options)
    result = NameFlash()(gm)
    assert (result.rewrites, targets(gm)) == (0, [SDPA])
    assert [skip.reason for skip in result.skips] == [f"attention keeps its choice of kernel: {reason}"]


def test_not_on_cpu_and_nothing_to_report_there() -> None:
    gm = graph(*qkv(device="cpu", dtype=torch.bfloat16))
    result = NameFlash()(gm)
    assert (result.rewrites, result.skips, targets(gm)) == (0, (), [SDPA])


@no_gpu
def test_not_where_flash_is_switched_off() -> None:
    with FakeTensorMode():
        gm = graph(*qkv())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        result = NameFlash()(gm)
    assert [skip.reason for skip in result.skips] == ["attention keeps its choice of kernel: flash is switched off"]


def plain_flash(query: Tensor, key: Tensor, value: Tensor, *rest: Any, scale: float) -> tuple[Tensor]:
    """The op's first result by its definition; without dropout."""
    logits = query.double() @ key.double().transpose(-2, -1) * scale
    if rest[1:] == (True,):
        logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf)
    return ((logits.softmax(-1) @ value.double()).to(query.dtype),)


class OnCpu(Interpreter):
    """Runs a graph with the named op computed by its definition."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return plain_flash(*args, **kwargs) if target is FLASH else super().call_function(target, args, kwargs)


@pytest.mark.parametrize("width", [16, 20, 7])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}])
@no_gpu
def test_padding_changes_no_value(width: int, options: dict[str, Any]) -> None:
    with FakeTensorMode():
        gm = graph(*qkv(width), **options)
    gm = NameFlash()(gm).gm
    tensors = qkv(width, device="cpu")
    [got] = OnCpu(gm).run(*tensors)
    wanted = F.scaled_dot_product_attention(*(t.double() for t in tensors), **options)
    torch.testing.assert_close(got.double(), wanted, atol=2e-3, rtol=0)


@pytest.mark.parametrize("width", [16, 20])
@no_gpu
def test_torch_compile_can_differentiate_it(width: int) -> None:
    """The joint graph of AOTAutograd, which fakes its inputs, whatever device they are on."""
    with FakeTensorMode():
        gm = graph(*qkv(width), dropout_p=0.1)
    gm = NameFlash()(gm).gm
    tensors = tuple(t.requires_grad_() for t in qkv(width, device="cpu"))
    joint = aot_export_joint_simple(lambda *given: (gm(*given)[0].clone(),), tensors, trace_joint=True)
    ops = [node.target for node in joint.graph.nodes]
    assert ops.count(FLASH) == ops.count(BACKWARD) == 1
    *_, query, key, value = (node.meta["val"] for node in joint.graph.output_node().args[0])
    assert query.shape == key.shape == value.shape == (2, 4, 8, width)


def vit(dtype: torch.dtype, heads: int = 2) -> tuple[nn.Module, Tensor]:
    """A model of heads with 32 / heads channels on fake CUDA tensors, in training mode."""
    model = GeneratedViT(Config(depth=3, width=32, heads=heads, prefix=1)).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        return model.to("cuda", dtype), torch.zeros(2, 3, 6, 8, device="cuda", dtype=dtype)


@no_gpu
def test_a_pruned_model_names_every_attention() -> None:
    model, images = vit(torch.bfloat16, heads=8)
    done = prune(prepare(model, (images,), {}, lower=True).gm, [Prune(0, lambda n: n - 2)])
    assert targets(done.gm) == [FLASH] * 3 and done.skips == ()
    assert [row.kernel.name for row in done.blocks if row.kernel] == ["flash"] * 3


@no_gpu
def test_with_nothing_to_prune_the_models_own_op_stays() -> None:
    """A result bit-equal to the model's is promised then."""
    model, images = vit(torch.float16)
    done = prune(prepare(model, (images,), {}, lower=True).gm, [])
    assert targets(done.gm) == [SDPA] * 3 and done.skips == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@no_gpu
def test_under_autocast_nothing_is_named(dtype: torch.dtype) -> None:
    """Autocast casts what SDPA reads, and a named op would meet float32 (a norm of the queries) or mixed inputs."""
    model, images = vit(dtype)
    ambient = {"cuda": torch.bfloat16}
    done = prune(prepare(model, (images,), {}, True, ambient).gm, [Prune(0, lambda n: n - 2)])
    assert targets(done.gm) == [SDPA] * 3
    assert len(done.skips) == 3 and "autocast is on" in done.skips[0].reason
    # the report says what SDPA takes once its inputs are cast
    assert [row.kernel.name for row in done.blocks if row.kernel] == ["flash"] * 3


def test_autocast_on_another_device_does_not_matter() -> None:
    model = GeneratedViT(Config(depth=2, width=16))
    for ambient in ({"cuda": torch.bfloat16}, {"cpu": torch.bfloat16}):
        gm = prepare(model, (model.images(2),), {}, True, ambient).gm
        assert [choice.name for _, choice in kernels(gm)] == ["flash"] * 2


@pytest.mark.cuda
@pytest.mark.parametrize("width", [16, 20, 64])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}])
def test_on_a_gpu_it_is_sdpa(width: int, options: dict[str, Any]) -> None:
    tensors = [t.requires_grad_() for t in qkv(width)]
    gm = NameFlash()(graph(*tensors, **options)).gm
    assert targets(gm) == [FLASH]
    wanted = F.scaled_dot_product_attention(*tensors, **options)
    found = torch.autograd.grad(wanted.sum(), tensors)
    [got] = gm(*tensors)
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=1e-3)
    for a, b in zip(torch.autograd.grad(got.sum(), tensors), found, strict=True):
        torch.testing.assert_close(a, b, atol=4e-3, rtol=1e-2)
