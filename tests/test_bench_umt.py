"""UMT's encoders: arithmetic, state-dict keys and checkpoints on shrunk sizes, GFLOPs on the published ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from bench.models.umt import Size, VisionEncoder, load_checkpoint, sincos, umt
from rs_compile import Schedule, optimize, plan
from rs_compile.models import ModelError

SMALL: dict[str, Any] = {"size": Size(24, 2, 3), "frames": 2, "side": 12, "patch": 4}
TOKENS = 2 * 3 * 3


def small(**options: Any) -> VisionEncoder:
    """Random weights, biases and norms included, so that none of them hides behind a zero or a one."""
    model = VisionEncoder(**SMALL, **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def clips(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 2, 12, 12, generator=torch.Generator().manual_seed(1))


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def reference(w: dict[str, Tensor], clip: Tensor, pool_norm: bool) -> Tensor:
    """The encoder from the facts sheet, patch by patch and head by head, in double precision."""
    w = {k: v.double() for k, v in w.items()}
    weight = w["encoder.patch_embed.proj.weight"]
    rows = [
        torch.einsum("bchw,ochw->bo", clip.double()[:, :, t, i : i + 4, j : j + 4], weight[:, :, 0])
        for t in range(2)
        for i in range(0, 12, 4)
        for j in range(0, 12, 4)
    ]
    x = torch.stack(rows, 1) + w["encoder.patch_embed.proj.bias"]
    for p in range(TOKENS):
        for j in range(24):
            angle = p / 10000 ** (2 * (j // 2) / 24)
            x[:, p, j] += math.cos(angle) if j % 2 else math.sin(angle)
    for i in range(2):
        b = {k.removeprefix(f"encoder.blocks.{i}."): v for k, v in w.items() if k.startswith(f"encoder.blocks.{i}.")}
        h = norm(x, b["norm1.weight"], b["norm1.bias"])
        wq, wk, wv = b["attn.qkv.weight"].split(24)
        q, k, v = h @ wq.T + b["attn.q_bias"], h @ wk.T, h @ wv.T + b["attn.v_bias"]
        heads = []
        for n in range(3):
            part = slice(8 * n, 8 * n + 8)
            weights = (q[..., part] @ k[..., part].mT / math.sqrt(8)).softmax(-1)
            heads.append(weights @ v[..., part])
        x = x + torch.cat(heads, -1) @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        h = norm(x, b["norm2.weight"], b["norm2.bias"]) @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + h @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
    mean = norm(x, w["encoder.norm.weight"], w["encoder.norm.bias"]).mean(1)
    return norm(mean, w["pool_norm.weight"], w["pool_norm.bias"]) if pool_norm else mean


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pool_norm", [True, False])
def test_arithmetic(attention: str, pool_norm: bool) -> None:
    model = small(attention=attention, pool_norm=pool_norm).double()
    expected = reference(model.state_dict(), clips(), pool_norm)
    # the position table is float32
    torch.testing.assert_close(model(clips().double()), expected, rtol=1e-5, atol=1e-6)


def test_positions_of_a_whole_clip() -> None:
    table = sincos(2352, 768)
    for p, j in ((0, 0), (1, 1), (2351, 0), (2351, 1), (777, 400), (1234, 767)):
        angle = p / 10000 ** (2 * (j // 2) / 768)
        assert abs(float(table[0, p, j]) - (math.cos(angle) if j % 2 else math.sin(angle))) < 1e-6


def test_state_dict_keys() -> None:
    block = [
        *(f"{n}.{p}" for n in ("norm1", "norm2") for p in ("weight", "bias")),
        *("attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"),
        *(f"mlp.{n}.{p}" for n in ("fc1", "fc2") for p in ("weight", "bias")),
    ]
    expected = {f"encoder.blocks.{i}.{key}" for i in range(2) for key in block}
    expected |= {f"encoder.{n}.{p}" for n in ("patch_embed.proj", "norm") for p in ("weight", "bias")}
    assert set(small(pool_norm=False).state_dict()) == expected
    assert set(small().state_dict()) == expected | {"pool_norm.weight", "pool_norm.bias"}


def test_sizes() -> None:
    with torch.device("meta"):
        base, large = umt("umt_b"), umt("umt_l", pool_norm=False)
    assert len(base.encoder.blocks) == 12 and len(large.encoder.blocks) == 24
    assert base.encoder.pos_embed.shape == (1, 2352, 768) and large.encoder.pos_embed.shape == (1, 2352, 1024)
    assert base.state_dict()["encoder.patch_embed.proj.weight"].shape == (768, 3, 1, 16, 16)
    assert not base.training


def test_unknown_names() -> None:
    unknown: Any = "flash"
    with pytest.raises(ValueError, match="there is no encoder 'umt_h'; write one of umt_b, umt_l"):
        umt("umt_h")
    with pytest.raises(ValueError, match="attention is 'flash'; write"):
        umt("umt_b", attention=unknown)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_pruned_like_by_hand(attention: str) -> None:
    """The tokens that leave are those of the smallest ||MLP(LN(x')) - x'||; the rest goes on alone."""
    model = small(attention=attention).double()
    encoder = model.encoder
    x = encoder.patch_embed(clips().double()) + encoder.pos_embed.double()
    first, second = encoder.blocks
    middle = x + first.attn(first.norm1(x))
    branch = first.mlp(first.norm2(middle))
    stay = (branch - middle).norm(dim=-1).topk(TOKENS - int(0.5 * TOKENS)).indices.sort().values
    kept = torch.stack([row[index] for row, index in zip(middle + branch, stay, strict=True)])
    expected = model.pool_norm(encoder.norm(second(kept)).mean(1))
    optimized = optimize(model, Schedule({0: 0.5}), backend="eager")
    # lowering writes attention in another order
    torch.testing.assert_close(optimized(clips().double()), expected, rtol=1e-9, atol=1e-9)


def whole(model: VisionEncoder) -> dict[str, Tensor]:
    """What a retrieval checkpoint holds: the encoder under its prefix, and parts that are not the encoder's."""
    weights = {f"vision_encoder.{k}": v.clone() for k, v in model.state_dict().items()}
    return weights | {"text_encoder.embeddings.weight": torch.ones(2), "vision_proj.weight": torch.ones(3)}


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefixed", [True, False])
def test_a_checkpoint_loads(tmp_path: Path, wrapped: bool, suffix: str, prefixed: bool) -> None:
    source, path = small(), tmp_path / f"umt{suffix}"
    weights = whole(source) if prefixed else source.state_dict()
    if suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save({"model": weights, "epoch": 3} if wrapped else weights, path)
    model = VisionEncoder(**SMALL).eval()
    load_checkpoint(model, path)
    assert torch.equal(model(clips()), source(clips()))


def fault(tmp_path: Path, weights: dict[str, Tensor], model: VisionEncoder | None = None) -> str:
    torch.save({"model": weights}, tmp_path / "bad.pth")
    with pytest.raises(ModelError) as caught:
        load_checkpoint(model or small(), tmp_path / "bad.pth")
    return str(caught.value)


def test_a_key_that_does_not_fit_is_named(tmp_path: Path) -> None:
    weights = whole(small())
    missing = {k: v for k, v in weights.items() if k != "vision_encoder.encoder.blocks.1.attn.q_bias"}
    assert "missing in the file: encoder.blocks.1.attn.q_bias" in fault(tmp_path, missing)
    left = weights | {"vision_encoder.encoder.blocks.2.attn.q_bias": torch.zeros(24)}
    assert "left over in the file: encoder.blocks.2.attn.q_bias" in fault(tmp_path, left)
    assert "left over in the file: pool_norm.weight, pool_norm.bias" in fault(tmp_path, weights, small(pool_norm=False))
    odd = weights | {"vision_encoder.encoder.norm.bias": torch.zeros(25)}
    assert "encoder.norm.bias is [25], the model's [24]" in fault(tmp_path, odd)


def test_without_a_prefix_nothing_is_left_out(tmp_path: Path) -> None:
    weights = small().state_dict() | {"text_encoder.embeddings.weight": torch.ones(2)}
    assert "left over in the file: text_encoder.embeddings.weight" in fault(tmp_path, weights)


def gflops(name: str, keep: float) -> tuple[float, float, list[int | None]]:
    with torch.device("meta"):
        model, clip = umt(name), torch.empty(1, 3, 12, 224, 224)
    report = plan(model, Schedule({0: keep, 1: keep, 2: keep}), clip, drop_unread=False)
    return round(report.flops_dense / 1e9, 3), round(report.flops / 1e9, 3), [b.tokens_out for b in report.blocks[:3]]


def test_gflops_to_the_printed_digit() -> None:
    assert gflops("umt_b", 0.8) == (303.343, 156.400, [1882, 1506, 1205])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "keep", "expected"),
    [
        ("umt_b", 0.9, (303.343, 217.662, [2117, 1906, 1716])),
        ("umt_l", 0.8, (984.624, 478.487, [1882, 1506, 1205])),
        ("umt_l", 0.9, (984.624, 690.538, [2117, 1906, 1716])),
    ],
)
def test_gflops_of_the_other_rows(name: str, keep: float, expected: tuple[float, float, list[int]]) -> None:
    assert gflops(name, keep) == expected
