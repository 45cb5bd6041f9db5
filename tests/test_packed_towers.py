"""Vision towers of language models, whose images lie one after another in one sequence [N, C], against pruning by hand.

By hand: the model's own linear layers and norms, rotation and attention written out, tokens chosen in a Python loop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from oracle import Stream, distance
from schedules import merger_of
from torch import Tensor, nn
from transformers import PixtralVisionConfig, PixtralVisionModel
from transformers.models.glm4v.configuration_glm4v import Glm4vVisionConfig
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from rs_compile import CaptureError, CompileError, InputError, Refusal, Schedule, explain, optimize

SHAPE: dict[str, Any] = {"num_heads": 2, "patch_size": 4}
CLOSE: dict[str, float] = {"atol": 1e-6, "rtol": 0}  # the models rotate in float32, whatever their dtype


def qwen2_vl(depth: int = 4) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2VLVisionConfig(**SHAPE, depth=depth, embed_dim=32, hidden_size=24, mlp_ratio=2)
    return Qwen2VisionTransformerPretrainedModel(config).eval().double()


def qwen2_5_vl() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(
        **SHAPE, depth=5, hidden_size=32, out_hidden_size=24, intermediate_size=48, window_size=16,
        fullatt_block_indexes=[1, 2, 4],
    )  # fmt: skip
    return Qwen2_5_VisionTransformerPretrainedModel(config).eval().double()


def glm4v() -> nn.Module:
    torch.manual_seed(0)
    config = Glm4vVisionConfig(
        **SHAPE, depth=3, hidden_size=32, out_hidden_size=24, intermediate_size=48, image_size=32
    )
    return Glm4vVisionModel(config).eval().double()


def patches(*grids: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Flattened patches [N, 96] of images of so many frames, rows and columns, and their grids."""
    count = sum(t * h * w for t, h, w in grids)
    return torch.randn(count, 96, generator=torch.Generator().manual_seed(1)).double(), torch.tensor(grids)


def optimized(model: nn.Module, schedule: Any, **options: Any) -> Any:
    return optimize(model, schedule, backend="eager", constant_inputs=("grid_thw",), **options)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[n, H, d] turned by the angles [n, d] of its tokens."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return (x.float() * cos[:, None].float() + turned.float() * sin[:, None].float()).to(x.dtype)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[n, H, d] each -> [n, H * d]."""
    weights = (torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def packed_by_hand(
    model: Any,
    x: Tensor,
    grid: Tensor,
    keep: Mapping[int, float],
    back: int = -1,
    window: Callable[[int], int] = lambda _: 0,
) -> Tensor:
    """The stream [N, C] behind the blocks.

    Args:
        back: behind this block every token is back.
        window: from a block how many consecutive tokens attend to each other, 0 for all.
    """
    seen: dict[str, Any] = {}

    def note(_: Any, args: Any, kwargs: Any) -> None:
        seen.update(stream=args[0], angles=kwargs["position_embeddings"])

    hook = model.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    model(x, grid)
    hook.remove()
    stream, (cos, sin) = Stream(seen["stream"][None]), seen["angles"]
    for i, block in enumerate(model.blocks):
        here, at = stream.tokens[0], stream.index[0]
        q, k, v = block.attn.qkv(block.norm1(here)).view(len(here), 3, 2, -1).unbind(1)
        q, k = rotated(q, cos[at], sin[at]), rotated(k, cos[at], sin[at])
        size = window(i) or len(here)
        parts = [attended(*(t[j : j + size] for t in (q, k, v))) for j in range(0, len(here), size)]
        middle = here + block.attn.proj(torch.cat(parts))
        mlp = block.mlp(block.norm2(middle))
        stream.tokens = (middle + mlp)[None]
        if i in keep:
            stream.prune(distance(mlp, middle, "l2")[None], keep[i], 0)
        if i == back:
            stream = Stream(stream.restored())
    return stream.restored()[0]


KEEP = {0: 0.75, 2: 0.5}


@torch.no_grad()
def test_qwen2_vl_with_one_image_is_pruning_by_hand() -> None:
    model, (x, grid) = qwen2_vl(), patches((1, 4, 6))
    got = optimized(model, KEEP)(x, grid_thw=grid)
    stream = packed_by_hand(model, x, grid, KEEP)
    torch.testing.assert_close(got.last_hidden_state, stream, **CLOSE)
    torch.testing.assert_close(got.pooler_output, model.merger(stream), **CLOSE)
    assert (stream - model(x, grid).last_hidden_state).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("make", [qwen2_vl, qwen2_5_vl, glm4v])
def test_keeping_every_token_is_the_model(make: Callable[[], nn.Module]) -> None:
    model, (x, grid) = make(), patches((1, 8, 6))
    got, wanted = optimized(model, {0: 1.0})(x, grid_thw=grid), model(x, grid)
    assert torch.equal(got.last_hidden_state, wanted.last_hidden_state)
    assert torch.equal(got.pooler_output, wanted.pooler_output)


@torch.no_grad()
def test_glm4v_with_one_image_is_pruning_by_hand() -> None:
    model: Any = glm4v()
    x, grid = patches((1, 4, 6))
    got = optimized(model, {0: 0.5})(x, grid_thw=grid)
    stream = model.post_layernorm(packed_by_hand(model, x, grid, {0: 0.5}))
    wanted = model.downsample(stream.view(-1, 2, 2, 32).permute(0, 3, 1, 2)).flatten(1)
    torch.testing.assert_close(got.last_hidden_state, wanted, **CLOSE)
    torch.testing.assert_close(got.pooler_output, model.merger(wanted), **CLOSE)


@torch.no_grad()
def test_qwen2_5_vl_gives_every_token_back_to_its_windows() -> None:
    model: Any = qwen2_5_vl()
    x, grid = patches((1, 8, 12))
    handle = optimized(model, {1: 0.5})
    got = handle(x, grid_thw=grid)
    # windows are 4 x 4 patches, one after another, and blocks 1, 2 and 4 attend to all
    stream = packed_by_hand(model, x, grid, {1: 0.5}, back=2, window=lambda i: 16 if i in (0, 3) else 0)
    torch.testing.assert_close(got.last_hidden_state, stream, **CLOSE)
    assert [row.tokens_in for row in handle.report().blocks] == [96, 96, 48, 96, 96]


@torch.no_grad()
def test_qwen2_5_vl_has_no_layer_between_a_windowed_block_and_the_next() -> None:
    x, grid = patches((1, 8, 12))
    rows = explain(qwen2_5_vl(), x, {"grid_thw": grid}, constant_inputs=["grid_thw"]).rows
    assert [row.prunable for row in rows] == [True, True, False, True, True]
    assert "splits the tokens at 16 of 96, between tokens that may go" in rows[2].reason


@torch.no_grad()
@pytest.mark.parametrize("grids", [((1, 4, 2), (1, 4, 4)), ((3, 4, 2),)])
def test_several_images_or_frames_are_refused_with_what_to_do(grids: Any) -> None:
    x, grid = patches(*grids)
    with pytest.raises(Refusal) as error:
        optimized(qwen2_vl(), {0: 0.5})(x, grid_thw=grid)
    reason, where, way_out = str(error.value).splitlines()
    assert reason == (
        "aten.split_with_sizes.default (split_with_sizes_3): splits the tokens at 8 of 24, between tokens that may go, "
        "and later layers depend on it; no layer lies between [RSC-404]"
    )
    assert "modeling_qwen2_vl.py" in where and "splits = [" in where
    assert way_out == (
        "  way out: call the model with one image, prune after a later block, or register a rule with "
        "rs_compile.register_token_rule"
    )


@torch.no_grad()
def test_several_images_unpruned_are_the_model() -> None:
    model, (x, grid) = qwen2_vl(), patches((1, 4, 2), (1, 4, 4))
    assert torch.equal(optimized(model, {})(x, grid_thw=grid)[0], model(x, grid)[0])


@torch.no_grad()
def test_each_grid_is_captured_once() -> None:
    model, said = qwen2_vl(2), list[str]()
    handle = optimized(model, {0: 0.5}, progress=said.append)
    for grid in ((1, 4, 6), (1, 6, 4), (1, 4, 6), (1, 2, 6), (1, 6, 4)):
        x, grids = patches(grid)
        torch.testing.assert_close(handle(x, grid_thw=grids)[0], packed_by_hand(model, x, grids, {0: 0.5}), **CLOSE)
    assert said.count("capturing the model") == 3
    assert "int64[1, 3] on cpu, always [[1, 6, 4]]" in str(handle.report())


@torch.no_grad()
def test_a_copy_has_the_constant_inputs_and_the_weights_are_the_models() -> None:
    model, (x, grid) = qwen2_vl(2), patches((1, 4, 6))
    handle = optimized(model, {0: 0.5})
    other = copy.deepcopy(handle)
    assert torch.equal(other(x, grid_thw=grid)[0], handle(x, grid_thw=grid)[0])
    assert list(handle.state_dict()) == list(model.state_dict())
    handle.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    torch.testing.assert_close(handle(x, grid_thw=grid)[0], packed_by_hand(model, x, grid, {0: 0.5}), **CLOSE)
    assert not torch.equal(other(x, grid_thw=grid)[0], handle(x, grid_thw=grid)[0])


@torch.no_grad()
def test_guard_measures_with_constant_inputs() -> None:
    model, (x, grid) = qwen2_vl(2), patches((1, 4, 6))
    handle = optimized(model, {0: 0.5}, guard="measure")
    got = handle(x, grid_thw=grid)[0]
    verdict = handle.report().guard
    assert verdict is not None and not verdict.reason
    wanted = packed_by_hand(model, x, grid, {0: 0.5} if verdict.kept == "pruned" else {})
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_gradients_reach_the_weights() -> None:
    model, (x, grid) = qwen2_vl(2), patches((1, 4, 6))
    optimized(model, {0: 0.5})(x, grid_thw=grid).pooler_output.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("merger", ["stream", "tome", "vid-tldr"])
def test_merging_one_image_keeps_the_shapes(merger: Any) -> None:
    model, (x, grid) = qwen2_vl(3), patches((1, 4, 6))
    handle = optimized(model, Schedule(merge={0: 5, 1: 4}, by=merger_of(merger, restore="copy")))
    got, wanted = handle(x, grid_thw=grid), model(x, grid)
    assert got.last_hidden_state.shape == wanted.last_hidden_state.shape
    assert handle.report().blocks[2].tokens_in == 15
    assert got.last_hidden_state.unique(dim=0).shape[0] == 15


def test_an_export_that_stops_at_the_data_names_the_option() -> None:
    x, grid = patches((1, 4, 6))
    with pytest.raises(CaptureError) as error:
        optimize(qwen2_vl(2), {0: 0.5}, backend="eager")(x, grid_thw=grid)
    assert str(error.value).splitlines()[-1] == (
        '  way out: pass constant_inputs=("grid_thw",): the graph then holds the value of such an input fast, and '
        "another value is another capture"
    )


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("grid",), "constant_inputs names grid, and Qwen2VisionTransformerPretrainedModel was called with grid_thw, "),
        (("hidden_states",), "constant_inputs names hidden_states, which is float64[24, 96] on cpu; its values are "),
    ],
)
def test_what_cannot_be_a_constant_input(names: Any, text: str) -> None:
    x, grid = patches((1, 4, 6))
    with pytest.raises(InputError) as error:
        optimize(qwen2_vl(2), {0: 0.5}, backend="eager", constant_inputs=names)(x, grid_thw=grid)
    assert str(error.value).startswith(text)


def pixtral() -> Any:
    torch.manual_seed(0)
    config = PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=4
    )
    return PixtralVisionModel(config).eval().double()


def pixtral_by_hand(model: Any, stream: Tensor, rows: int, columns: int, keep: Mapping[int, float]) -> Tensor:
    """The stream [1, N, C] behind the layers, from that before them."""
    places = torch.tensor([[r, c] for r in range(rows) for c in range(columns)])
    state = Stream(stream)
    cos, sin = model.patch_positional_embedding(stream, places)
    for i, layer in enumerate(model.transformer.layers):
        here, at = state.tokens[0], state.index[0]
        normed = layer.attention_norm(here)
        a = layer.attention
        q, k, v = (f(normed).view(len(here), 2, -1) for f in (a.q_proj, a.k_proj, a.v_proj))
        c, s = cos.double()[at], sin.double()[at]
        half = q.shape[-1] // 2
        q, k = (t * c[:, None] + torch.cat([-t[..., half:], t[..., :half]], -1) * s[:, None] for t in (q, k))
        middle = here + a.o_proj(attended(q, k, v))
        mlp = layer.feed_forward(layer.ffn_norm(middle))
        state.tokens = (middle + mlp)[None]
        if i in keep:
            state.prune(distance(mlp, middle, "l2")[None], keep[i], 0)
    return state.restored()


@torch.no_grad()
@pytest.mark.parametrize("given", [False, True])
def test_pixtral_with_one_image_is_pruning_by_hand(given: bool) -> None:
    model, images = pixtral(), torch.randn(1, 3, 16, 24).double()
    sizes = {"image_sizes": torch.tensor([[12, 24]])} if given else {}
    rows = 3 if given else 4
    handle = optimize(model, {0: 0.75, 1: 0.5}, backend="eager", constant_inputs=tuple(sizes))
    got = handle(images, **sizes).last_hidden_state
    start = model.ln_pre(model.patch_conv(images)[:, :, :rows].flatten(2).mT)
    torch.testing.assert_close(got, pixtral_by_hand(model, start, rows, 6, {0: 0.75, 1: 0.5}), **CLOSE)


def test_pixtral_with_several_images_says_one_a_call() -> None:
    with pytest.raises(CompileError) as error:
        optimize(pixtral(), {0: 0.5}, backend="eager")(torch.randn(3, 3, 16, 24).double())
    reason, where, way_out = str(error.value).splitlines()
    assert (
        "the residual stream is ['1', '72', '32'], not [batch, tokens, channels], and the model's code fixes its 3"
        in reason
    )
    assert "modeling_pixtral.py" in where
    assert way_out.endswith("of several samples in one sequence cannot be pruned; with one sample a call they might")
