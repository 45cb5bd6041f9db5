"""SAM, whose global layers add to the scores what each query makes of tables of rows and of columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

import rs_compile

pytestmark = pytest.mark.usefixtures("captured_once")

GLOBAL = [1, 2, 4]
KEEP = {0: 0.6, 1: 0.7, 3: 0.5}  # the second narrows what the first left; all come back before layer 3


class Encoder(nn.Module):
    """An encoder that returns its map: [B, 3, H, W] to [B, C, H / 8, W / 8]."""

    def __init__(self, library: str, attention: str = "sdpa") -> None:
        super().__init__()
        torch.manual_seed(0)
        if library == "timm":
            timm = pytest.importorskip("timm.models.vision_transformer_sam")
            sizes = {"img_size": (48, 64), "patch_size": 8, "embed_dim": 48, "depth": 5, "num_heads": 4}
            rest = {"use_rel_pos": True, "use_abs_pos": False, "num_classes": 0, "neck_chans": 16}
            windows = {"window_size": 4, "global_attn_indexes": GLOBAL}
            self.inner = timm.VisionTransformerSAM(**sizes, **rest, **windows, global_pool="")
            self.layers, self.grid = self.inner.blocks, (6, 8)
        else:
            transformers = pytest.importorskip("transformers")
            sizes = {"image_size": 64, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 5, "mlp_dim": 96}
            rest = {"num_attention_heads": 4, "output_channels": 16, "attn_implementation": attention}
            config = transformers.SamVisionConfig(**sizes, **rest, window_size=4, global_attn_indexes=GLOBAL)
            self.inner = transformers.SamVisionModel(config)
            self.layers, self.grid = self.inner.vision_encoder.layers, (8, 8)
        self.precision = 1e-6 if attention == "eager" else 1e-12  # it takes the softmax in float32
        self.eval().double()
        oracle.shake(self, 0.2)

    def forward(self, images: Tensor) -> Tensor:
        out = self.inner(images)
        return out if isinstance(out, Tensor) else out[0]

    def images(self) -> Tensor:
        rows, columns = self.grid
        return torch.randn(2, 3, 8 * rows, 8 * columns, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture(
    scope="module", params=[("timm", "sdpa"), ("transformers", "sdpa"), ("transformers", "eager")], ids=" ".join
)
def model(request: pytest.FixtureRequest) -> Encoder:
    return Encoder(*request.param)


def attend(attn: Any, x: Tensor, at: Tensor, grid: Sequence[int]) -> Tensor:
    """Attention among the tokens of one sample that lie `at` some cells of the grid: [K, C] to [K, C]."""
    heads = getattr(attn, "num_heads", None) or attn.num_attention_heads
    q, k, v = attn.qkv(x).reshape(len(x), 3, heads, -1).unbind(1)
    row, column = at // grid[1], at % grid[1]
    down, across = (c[:, None] - c[None] + size - 1 for c, size in zip((row, column), grid, strict=True))
    scores = torch.einsum("qhc,khc->hqk", q, k) / q.shape[-1] ** 0.5
    for table, offset in ((attn.rel_pos_h, down), (attn.rel_pos_w, across)):
        scores = scores + torch.einsum("qhc,qkc->hqk", q, table[offset])
    out: Tensor = attn.proj(torch.einsum("hqk,khc->qhc", scores.softmax(-1), v).flatten(1))
    return out


def whole_layer(layer: Any, norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A layer with windows on every token [B, H, W, C], and each token's score [B, N]."""
    seen: dict[str, Tensor] = {}
    hooks = [
        norm.register_forward_pre_hook(lambda _, args: seen.update(stream=args[0])),
        layer.mlp.register_forward_hook(lambda _, __, out: seen.update(branch=out)),
    ]
    x = layer(x)
    for hook in hooks:
        hook.remove()
    return x, (seen["branch"] - seen["stream"]).norm(dim=-1).reshape(len(x), -1)


@torch.no_grad()
def by_hand(model: Encoder, stream: Tensor) -> Tensor:
    """[B, H, W, C] at the first layer to the same behind the last: sample by sample where tokens are gone."""
    grid, whole = model.grid, stream.flatten(1, 2)
    left = [torch.arange(whole.shape[1])] * len(whole)
    for i, layer in enumerate(model.layers):
        norm1, norm2 = (getattr(layer, f"norm{n}", None) or getattr(layer, f"layer_norm{n}") for n in (1, 2))
        if i not in GLOBAL:
            x, scores = whole_layer(layer, norm2, whole.unflatten(1, grid))
            whole, left = x.flatten(1, 2), [torch.arange(whole.shape[1])] * len(whole)
        else:
            whole, scores = whole.clone(), torch.zeros(whole.shape[:2]).double()
            for sample, at in enumerate(left):
                x = whole[sample, at]
                x = x + attend(layer.attn, norm1(x), at, grid)
                branch = layer.mlp(norm2(x))
                scores[sample, at] = (branch - x).norm(dim=-1)
                whole[sample, at] = x + branch
        if i in KEEP:
            kept = len(left[0]) - int(round((1 - KEEP[i]) * len(left[0]), 9))
            left = [at[s[at].topk(kept).indices.sort().values] for at, s in zip(left, scores, strict=True)]
    return whole.unflatten(1, grid)


def test_tokens_leave_before_the_global_layers(model: Encoder) -> None:
    images = model.images()
    seen: list[Tensor] = []
    hooks = [
        model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        model.layers[-1].register_forward_hook(lambda *_: by_hand(model, seen[0])),
    ]
    with torch.no_grad():
        wanted = model(images)
        for hook in hooks:
            hook.remove()
        handle = rs_compile.optimize(model, KEEP, backend="eager")
        pruned, dense = handle(images), model(images)
    torch.testing.assert_close(pruned, wanted, rtol=0, atol=model.precision)
    assert (dense - wanted).abs().max() > 0.01
    n = model.grid[0] * model.grid[1]
    first, third = (n - int((1 - share) * n) for share in (0.6, 0.5))
    second = first - int(round(0.3 * first, 9))
    assert [row.tokens_out for row in handle.report().blocks] == [first, second, n, third, third]


@torch.no_grad()
def test_that_keeps_all_gives_the_models_result(model: Encoder) -> None:
    handle = rs_compile.optimize(model, {0: 1.0, 3: 1.0}, backend="eager")
    torch.testing.assert_close(handle(model.images()), model(model.images()), rtol=0, atol=0)


def test_explain_says_what_optimize_does(model: Encoder) -> None:
    rows = rs_compile.explain(model, model.images()).rows
    assert [row.prunable for row in rows] == [True, True, False, True, True]
    with pytest.raises(rs_compile.Refusal, match="the token axis, and later layers depend on it"):
        rs_compile.optimize(model, {2: 0.5}, backend="eager")(model.images())
