"""The kernel of an attention: proven by lowering it on CPU, by torch's conditions for an absent GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx import GraphModule

from passes.attention.attention_kernel import KernelChoice, kernel_for, kernels, lowered_kernel, predicted_kernel

FLASH_CPU = "aten._scaled_dot_product_flash_attention_for_cpu.default"
HERE = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.cuda),
]


def tensor(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.zeros(shape, device=device, dtype=dtype).requires_grad_(grad)


def qkv(dim: int = 16, value_dim: int | None = None, keys: int = 8, **options: Any) -> list[Tensor]:
    return [
        tensor(2, 4, 8, dim, **options),
        tensor(2, 4, keys, dim, **options),
        tensor(2, 4, keys, value_dim or dim, **options),
    ]


def test_plain_attention_on_cpu_is_flash_and_says_how_it_is_known() -> None:
    assert kernel_for(*qkv()) == KernelChoice("flash", f"lowers to {FLASH_CPU}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_cpu_flash_takes_masks_and_every_dtype(dtype: torch.dtype, needs_grad: bool) -> None:
    for mask in (
        tensor(8, 8, dtype=dtype),
        tensor(2, 1, 8, 8, dtype=torch.bool),
        tensor(1, 4, 1, 8, dtype=dtype),
    ):
        assert kernel_for(*qkv(dtype=dtype), mask, needs_grad=needs_grad).name == "flash"


@pytest.mark.parametrize(
    ("tensors", "options", "reason"),
    [
        (qkv(value_dim=24), {}, "values have 24 channels a head, queries 16"),
        (qkv(), {"dropout_p": 0.1}, "dropout is on, which the CPU kernel does not have"),
        (qkv(), {"attn_mask": tensor(8, 8, grad=True)}, "the mask requires a gradient"),
        (qkv(), {"attn_mask": tensor(4, 8, 8)}, "the mask has rank 3, not 2 or 4"),
        ([t.unsqueeze(0) for t in qkv()], {}, "rank 5, not 4"),
        ([t.mT.contiguous().mT for t in qkv()], {}, "channels are not contiguous in memory"),
        ([tensor(2, 4, 8, 16), *(tensor(1, 4, 8, 16),) * 2], {}, "query, key and value differ in batch size"),
        (qkv(keys=0), {}, "no tokens"),
    ],
)
def test_what_keeps_flash_off_on_cpu(tensors: list[Tensor], options: dict[str, Any], reason: str) -> None:
    assert kernel_for(*tensors, **options) == KernelChoice("math", reason)


@pytest.mark.parametrize("device", HERE)
def test_the_lowering_is_torchs_own_choice_on_real_tensors(device: str) -> None:
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "fused"}
    cases: list[tuple[list[Tensor], Tensor | None, float, bool]] = [
        (qkv(dim, value, keys, device=device, dtype=dtype), mask, dropout, causal)
        for dim, value, keys, dtype, mask, dropout, causal in itertools.product(
            (16, 20), (16, 20), (8, 9), (torch.float32, torch.bfloat16), (None,), (0.0, 0.1), (False, True)
        )
    ]
    masks = (
        tensor(8, 8, device=device),
        tensor(2, 4, 8, 8, device=device),
        tensor(8, 8, device=device, grad=True),
    )
    cases += [(qkv(device=device), mask, 0.0, False) for mask in masks]
    for tensors, mask, dropout, causal in cases:
        with torch.no_grad():
            choice = names[torch._fused_sdp_choice(*tensors, mask, dropout, causal)]
        lowered, _ = lowered_kernel(*tensors, mask, dropout, causal)
        assert lowered == choice == kernel_for(*tensors, mask, dropout, causal).name
        if device == "cpu":
            assert predicted_kernel(*tensors, mask, dropout) == choice


def test_the_conditions_agree_with_the_lowering_on_cpu() -> None:
    lead = {3: (4,), 4: (2, 4), 5: (1, 2, 4)}
    for dims, value, mask_dims, grad, dropout, needs_grad in itertools.product(
        (3, 4, 5), (16, 24), (None, 2, 3, 4), (False, True), (0.0, 0.1), (False, True)
    ):
        if dims == 3 and mask_dims == 4:
            continue
        tensors = [tensor(*lead[dims], 8, 16), tensor(*lead[dims], 9, 16), tensor(*lead[dims], 9, value)]
        mask = None if mask_dims is None else tensor(*(1,) * (mask_dims - 2), 8, 9, grad=grad)
        lowered, _ = lowered_kernel(*tensors, mask, dropout, needs_grad=needs_grad)
        assert predicted_kernel(*tensors, mask, dropout) == lowered


def test_switching_flash_off_is_seen() -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        choice = kernel_for(*qkv())
    assert choice == KernelChoice("math", "flash is switched off or not in this build of torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the lowering decides")
@pytest.mark.parametrize(
    ("dtype", "dim", "value_dim", "mask", "name", "reason"),
    [
        (torch.float16, 64, 64, False, "flash", "expected on cuda; no such device here to lower for"),
        (torch.bfloat16, 256, 256, False, "flash", "expected on cuda; no such device here to lower for"),
        (torch.bfloat16, 20, 20, False, "flash", "expected on cuda; no such device here to lower for"),
        (
            torch.float32,
            64,
            64,
            False,
            "efficient",
            "torch.float32 queries; flash takes float16 and bfloat16",
        ),
        (torch.float16, 64, 64, True, "efficient", "an explicit mask"),
        (torch.float16, 512, 512, False, "efficient", "512 channels a head, more than 256"),
        (torch.float16, 64, 32, False, "efficient", "values have 32 channels a head, queries 64"),
        (torch.float16, 20, 20, True, "math", "an explicit mask"),
        (torch.float32, 18, 18, False, "math", "torch.float32 queries; flash takes float16 and bfloat16"),
        (torch.float64, 64, 64, False, "math", "torch.float64 queries; flash takes float16 and bfloat16"),
    ],
)
def test_cuda_without_a_gpu(dtype: torch.dtype, dim: int, value_dim: int, mask: bool, name: str, reason: str) -> None:
    with FakeTensorMode():
        tensors = qkv(dim, value_dim, device="cuda", dtype=dtype)
        given = tensor(8, 8, device="cuda", dtype=dtype) if mask else None
    assert kernel_for(*tensors, given) == KernelChoice(name, reason)


def test_an_unknown_device_gets_math() -> None:
    assert kernel_for(*qkv(device="meta")) == KernelChoice("math", "torch has no flash kernel on meta")


@pytest.mark.cuda
def test_the_conditions_are_torchs_on_a_gpu() -> None:
    for dim, value, dtype, masked in itertools.product(
        (16, 20, 64, 512), (16, 64), (torch.float32, torch.float16, torch.bfloat16), (False, True)
    ):
        tensors = qkv(dim, value, device="cuda", dtype=dtype)
        mask = tensor(8, 8, device="cuda", dtype=dtype) if masked else None
        choice = torch._fused_sdp_choice(*tensors, mask)
        if choice == 3:  # cuDNN is taken before flash on some GPUs
            continue
        assert {0: "math", 1: "flash", 2: "efficient"}[choice] == predicted_kernel(*tensors, mask)


class Biased(nn.Module):
    """SDPA with a learned bias [H, N, N] as it is, or after arithmetic."""

    def __init__(self, arithmetic: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4, 8, 8))
        self.arithmetic = arithmetic

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.unsqueeze(0) * 2 if self.arithmetic else self.bias.unsqueeze(0)
        plain = F.scaled_dot_product_attention(x, x, x)
        return F.scaled_dot_product_attention(plain, x, x, bias)


def capture(model: nn.Module, x: Tensor) -> GraphModule:
    return torch.export.export(model, (x,), dynamic_shapes=({0: Dim.AUTO},), strict=False).module(check_guards=False)


@pytest.mark.parametrize("arithmetic", [False, True])
def test_every_attention_of_a_graph_in_order_with_a_symbolic_batch(arithmetic: bool) -> None:
    gm = capture(Biased(arithmetic), torch.randn(2, 4, 8, 16))
    first, second = kernels(gm)
    assert [first[0].meta["val"].dim(), first[1].name] == [4, "flash"]
    # torch passes a parameter's own views to math even where no gradient is recorded
    assert second[1].name == ("flash" if arithmetic else "math")
    assert [choice.name for _, choice in kernels(gm, needs_grad=True)] == ["flash", "math"]


@pytest.mark.inductor
@pytest.mark.parametrize("arithmetic", [False, True])
def test_inductor_takes_the_kernel_that_was_read(arithmetic: bool) -> None:
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    x = torch.randn(2, 4, 8, 16)
    gm = capture(Biased(arithmetic), x)
    with torch.no_grad():
        _, code = run_and_get_code(torch.compile(gm), x)
    calls = "".join(code).count("= torch.ops." + FLASH_CPU.removesuffix(".default"))
    assert calls == [choice.name for _, choice in kernels(gm)].count("flash")
