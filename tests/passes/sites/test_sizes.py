"""Size bias by mask and by channel against its formula in double precision; the kernels they leave; weighted means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from generated import Config, GeneratedViT
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from passes.attention.attention_kernel import kernels, lowered_kernel, predicted_kernel
from passes.graph.layout import Fixed, Piece, Prunable, Tokens
from passes.pipeline import prepare, prune
from passes.sites.outcome import Compiled
from passes.sites.sizes import attend_by_channel, attend_by_mask, stretch_sizes, weighed
from passes.sites.steps import Behind, Merge, Prune


def qkv(dim: int = 64, keys: int = 50, heads: int = 3, groups: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
    """q [2, H, 40, d], k and v [2, H / groups, keys, d], and sizes [2, keys]; double precision."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, h, n, dim, generator=generator, dtype=torch.float64)
        for h, n in ((heads, 40), (heads // groups, keys), (heads // groups, keys))
    )
    return q, k, v, torch.randint(1, 40, (2, keys), generator=generator).double()


def by_formula(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, scale: float | None = None) -> Tensor:
    """softmax(Q K^T * scale + log n) V, with nothing fused."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return (logits + sizes.log()[:, None, None, :]).softmax(-1) @ v


@pytest.mark.parametrize("dim", [64, 20, 7, 8])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("groups", [1, 3])
def test_mask_and_channel_are_the_formula_in_float32(dim: int, scale: float | None, groups: int) -> None:
    given = qkv(dim, groups=groups)
    wanted = by_formula(*given, scale)
    q, k, v, sizes = (t.float() for t in given)
    for got in (
        attend_by_channel(q, k, v, sizes, scale, groups > 1),
        attend_by_mask(q, k, v, None, sizes, scale, groups > 1),
    ):
        assert got.shape == wanted.shape and got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, atol=5e-6, rtol=0)


def test_a_token_of_size_n_is_n_equal_tokens() -> None:
    q, k, v, _ = qkv(keys=5)
    times = torch.tensor([3, 1, 2, 1, 4])
    many = F.scaled_dot_product_attention(q, k.repeat_interleave(times, 2), v.repeat_interleave(times, 2))
    sizes = times.float().expand(2, -1)
    for got in (
        attend_by_channel(q.float(), k.float(), v.float(), sizes, None, False),
        attend_by_mask(q.float(), k.float(), v.float(), None, sizes, None, False),
    ):
        torch.testing.assert_close(got.double(), many, atol=2e-6, rtol=0)


def test_sizes_of_one_change_nothing() -> None:
    q, k, v, _ = (t.float() for t in qkv())
    torch.testing.assert_close(
        attend_by_channel(q, k, v, torch.ones(2, 50), None, False),
        F.scaled_dot_product_attention(q, k, v),
        atol=1e-6,
        rtol=0,
    )


def one_channel(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> Tensor:
    """The bias rounded into a single channel, padded by 8."""
    d = q.shape[-1]
    bias = (sizes.log() * math.sqrt(d))[:, None, :, None].expand(-1, k.shape[1], -1, 1).to(k.dtype)
    q, k = (F.pad(torch.cat(pair, -1), (0, 7)) for pair in ((q, torch.ones_like(q[..., :1])), (k, bias)))
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8)), scale=1 / math.sqrt(d))[..., :d]


def rounded(dtype: torch.dtype) -> Callable[..., Tensor]:
    """Attention as CUDA's autocast runs it: its inputs rounded to `dtype`."""
    attention = F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        mask = None if mask is None else mask.to(dtype)
        return attention(q.to(dtype), k.to(dtype), v.to(dtype), mask, **options)

    return attend


def errors(dtype: torch.dtype, autocast: bool = False) -> dict[str, float]:
    """Mean and largest error of each form in half precision, against the formula on the same rounded inputs."""
    found: dict[str, list[Tensor]] = {}
    for seed in range(4):
        q, k, v, sizes = qkv(keys=100, seed=seed)
        q, k, v = (t.to(dtype) for t in (q, k, v))
        wanted = by_formula(q.double(), k.double(), v.double(), sizes)
        with pytest.MonkeyPatch.context() as patch:
            if autocast:
                q, k, v = q.float(), k.float(), v.float()
                patch.setattr(F, "scaled_dot_product_attention", rounded(dtype))
            forms = {
                "two": attend_by_channel(q, k, v, sizes.float(), None, False),
                "one": one_channel(q, k, v, sizes.float()),
                "mask": attend_by_mask(q, k, v, None, sizes.float(), None, False),
                "rounded": F.scaled_dot_product_attention(q, k, v, sizes.log()[:, None, None].to(q.dtype)),
            }
        for name, got in forms.items():
            found.setdefault(name, []).append((got.double() - wanted).abs().mean())
    return {name: float(torch.stack(each).mean()) for name, each in found.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_two_channels_lose_no_more_than_plain_attention(dtype: torch.dtype) -> None:
    found = errors(dtype)
    q, k, v, sizes = qkv(keys=100)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    plain = F.scaled_dot_product_attention(q, k, v).double()
    rounding = float((plain - by_formula(q.double(), k.double(), v.double(), torch.ones_like(sizes))).abs().mean())
    assert found["two"] < 2 * rounding, (found, rounding)
    if dtype == torch.bfloat16:
        assert found["two"] < 0.75 * found["one"], found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mask_on_cpu_is_not_rounded(dtype: torch.dtype) -> None:
    found = errors(dtype)
    assert found["mask"] < 0.75 * found["rounded"], found


def test_under_autocast_the_bias_is_split_too() -> None:
    """A graph is traced in float32; autocast rounds queries and keys to bfloat16 when it runs."""
    found = errors(torch.bfloat16, autocast=True)
    assert found["two"] < 0.75 * found["one"], found


@pytest.mark.parametrize("boolean", [False, True])
def test_the_bias_joins_a_mask_that_is_there(boolean: bool) -> None:
    q, k, v, sizes = (t.float() for t in qkv(keys=40))
    hidden = torch.rand(40, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    added = torch.zeros(40, 40).masked_fill(hidden, -math.inf)
    got = attend_by_mask(q, k, v, ~hidden if boolean else added, sizes, None, False)
    logits = q @ k.transpose(-2, -1) / 8 + sizes.log()[:, None, None, :]
    torch.testing.assert_close(got, logits.masked_fill(hidden, -math.inf).softmax(-1) @ v, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dim", [64, 20, 80])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_cuda_the_channel_keeps_flash_and_the_mask_does_not(dtype: torch.dtype, dim: int) -> None:
    """On fake tensors: the values that each form hands to scaled_dot_product_attention."""
    seen: list[str] = []
    sdpa = F.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        assert q.shape[-1] % 8 == 0 or attn_mask is not None
        seen.append(predicted_kernel(q, k, v, attn_mask))
        return torch.empty_like(q)

    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        q, k, v = (torch.zeros(2, 3, n, dim, device="cuda", dtype=dtype) for n in (40, 50, 50))
        sizes = torch.ones(2, 50, device="cuda")
        patch.setattr(F, "scaled_dot_product_attention", record)
        attend_by_channel(q, k, v, sizes, None, False)
        attend_by_mask(q, k, v, None, sizes, None, False)
    assert F.scaled_dot_product_attention is sdpa
    assert seen[0] == "flash" and seen[1] in ("efficient", "math")


def test_on_cpu_the_mask_keeps_flash() -> None:
    q, k, v, sizes = (t.float() for t in qkv())
    name, proof = lowered_kernel(q, k, v, sizes.log()[:, None, None, :])
    assert name == "flash" and "flash_attention_for_cpu" in str(proof)


def merged_on(device: str, dtype: torch.dtype, explicit: bool = False) -> Compiled:
    """A small model's graph with a merge in block 0 and a prune in block 1, captured on that device."""
    model = GeneratedViT(Config(depth=3, width=128, heads=2, prefix=1))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = model.to(device, dtype)
        images = torch.zeros(2, 3, 6, 8, device=device, dtype=dtype)
    gm = prepare(model, (images,), {}, lower=True).gm
    return prune(gm, [Merge(0, lambda n: 4), Prune(1, lambda n: n - 2)], behind=Behind(explicit=explicit))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the lowering decides")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_graph_on_cuda_takes_the_channel_and_flash_throughout(dtype: torch.dtype) -> None:
    done = merged_on("cuda", dtype)
    assert done.size_bias == "channel"
    found = [(tuple(op.args[0].meta["val"].shape[1:]), choice.name) for op, choice in kernels(done.gm)]
    assert found == [((2, 13, 64), "flash"), ((2, 9, 72), "flash"), ((2, 7, 72), "flash")]


def test_a_graph_on_cpu_takes_the_mask_and_flash_throughout() -> None:
    done = merged_on("cpu", torch.float32)
    assert done.size_bias == "mask"
    found = [(tuple(op.args[0].meta["val"].shape[1:]), choice.name) for op, choice in kernels(done.gm)]
    assert found == [((2, 13, 64), "flash"), ((2, 9, 64), "flash"), ((2, 7, 64), "flash")]


@pytest.mark.inductor
@pytest.mark.slow
@torch.no_grad()
def test_inductor_takes_the_flash_kernel_with_the_mask() -> None:
    from torch._inductor.utils import run_and_get_code

    import rs_compile

    torch._dynamo.reset()
    model = GeneratedViT(Config(depth=3, width=32, heads=2, prefix=1))
    images = model.images(2)
    schedule = rs_compile.Schedule(merge={0: 4}, by=rs_compile.Stream(weighted_mean=True))
    got, code = run_and_get_code(rs_compile.optimize(model, schedule), images)
    lines = [line for text in code for line in text.splitlines()]
    calls = [line for line in lines if "= torch.ops.aten._scaled_dot_product_flash_attention_for_cpu" in line]
    assert len(calls) == 3, calls
    assert sum("attn_mask=None" not in line and "attn_mask" in line for line in calls) == 2, calls
    torch.testing.assert_close(got, rs_compile.optimize(model, schedule, backend="eager")(images), atol=1e-4, rtol=0)


@given(data=st.data())
def test_a_weighted_mean_is_the_mean_of_the_weighed(data: st.DataObject) -> None:
    """For every place of samples and tokens among the dimensions."""
    at = data.draw(st.permutations(range(3)))
    samples, tokens = at.index(0), at.index(1)
    sizes = torch.randint(1, 9, (2, 5), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).float()
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    wanted = torch.stack([(x[b] * sizes[b, :, None]).sum(0) / sizes[b].sum() for b in range(2)])
    got = weighed(x.permute(at), sizes, samples, tokens).mean(tokens)
    torch.testing.assert_close(got if samples < at.index(2) else got.t(), wanted)


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        ((Fixed(1), Prunable(4)), [1.0, 2.0, 3.0]),
        ((Prunable(4),), [2.0, 3.0]),
        ((Fixed(2), Prunable(4), Fixed(1)), [1.0, 1.0, 2.0, 3.0, 1.0]),
    ],
)
def test_sizes_along_another_sequence_of_the_same_tokens(pieces: tuple[Piece, ...], wanted: list[float]) -> None:
    """A class token that joins or leaves stands for itself."""
    site = Tokens((Fixed(1), Prunable(4)))
    assert stretch_sizes(torch.tensor([[1.0, 2.0, 3.0]]), site, pieces).tolist() == [wanted]
