"""Windows and frames folded into the batch: each keeps as many tokens, and a layer that joins them reads all of them.

The oracle runs the library's own layers on one window after another. B samples of w windows, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import oracle
import pytest
import torch
from merge_oracle import match
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import rs_compile
from passes.graph.base import Refusal
from passes.sites.site import Restore
from rs_compile.planning import plans

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 24, "num_attention_heads": 2, "hidden_act": "gelu"}
B = 3


def made(config: Any, kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    model = kind(config).eval().double()
    oracle.shake(model, 0.2)
    return model


def lw_detr() -> Any:
    """Layers 1 and 4 are global; 4 windows a sample, of 9 tokens."""
    config = transformers.LwDetrViTConfig(
        **SMALL, num_hidden_layers=6, window_block_indices=[0, 2, 3, 5], num_windows=4, image_size=48,
        pretrain_image_size=48, patch_size=8, out_indices=[2, 4, 6],
    )  # fmt: skip
    return made(config, transformers.LwDetrViTBackbone)


def rf_detr() -> Any:
    """Layer 3 is global; 4 windows a sample, of a class token and 9 others."""
    from transformers.models.rf_detr.modeling_rf_detr import RfDetrDinov2Backbone, RfDetrDinov2Config

    config = RfDetrDinov2Config(
        **SMALL, num_hidden_layers=5, window_block_indexes=[0, 1, 2, 4], num_windows=2, image_size=48, patch_size=8,
        out_indices=[2, 5],
    )  # fmt: skip
    return made(config, RfDetrDinov2Backbone)


def video_prism() -> Any:
    """Four frames in the batch, then 9 positions."""
    config = transformers.VideoPrismVisionConfig(
        **SMALL, num_spatial_layers=3, num_temporal_layers=2, num_frames=4, tubelet_size=[1, 8, 8], image_size=24,
        intermediate_size=48,
    )  # fmt: skip
    return made(config, transformers.VideoPrismVisionModel)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def norm_between(layer: Any) -> nn.Module:
    """The norm that reads the stream between attention and MLP."""
    norm: nn.Module = layer.norm2 if hasattr(layer, "norm2") else layer.layernorm_after
    return norm


def shifts(layer: Any, stream: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer gives, and ||F(x) - x|| of its MLP for each token of it."""
    seen: list[Tensor] = []
    hook = norm_between(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = layer(stream)
    hook.remove()
    return out, (out - 2 * seen[0]).norm(dim=-1)


def best(places: list[int], score: Tensor, count: int, prefix: int) -> list[int]:
    """The first `prefix` places and those of the highest scores [N], `count` in all."""
    ranked = sorted(places[prefix:], key=lambda at: -float(score[at]))
    return sorted(places[:prefix] + ranked[: count - prefix])


def run_layers(
    layers: Sequence[Any], stream: Tensor, keep: Mapping[int, int], joining: Collection[int] = (), prefix: int = 0
) -> list[Tensor]:
    """The stream [w B, N, C] after each layer, every token in it.

    Args:
        keep: by layer how many tokens of each window are left behind it.
        joining: layers that read all windows of a sample at once.
        prefix: so many tokens of each window stay.
    """
    every = [list(range(stream.shape[1])) for _ in stream]
    left, streams = every, []
    for i, layer in enumerate(layers):
        stream = stream.clone()
        if i in joining:
            left = every
            stream, scores = shifts(layer, stream)
        else:
            scores = torch.zeros(stream.shape[:2])
            for row, places in enumerate(left):
                now, score = shifts(layer, stream[row : row + 1, places])
                stream[row, places], scores[row, places] = now[0], score[0].float()
        if i in keep:
            left = [best(places, score, keep[i], prefix) for places, score in zip(left, scores, strict=True)]
        streams.append(stream)
    return streams


class ByHand(nn.Module):
    """In the place of a backbone's encoder."""

    def __init__(self, encoder: Any, *how: Any) -> None:
        super().__init__()
        self.encoder, self.how = encoder, how

    def forward(self, stream: Tensor, **_: Any) -> Any:
        streams = [stream, *run_layers(self.encoder.layer, stream, *self.how)]
        return transformers.modeling_outputs.BaseModelOutput(streams[-1], hidden_states=tuple(streams))


def maps(model: Any, images: Tensor, *how: Any) -> Sequence[Tensor]:
    """The feature maps of a backbone whose encoder runs by hand."""
    encoder = model.encoder
    model.encoder = ByHand(encoder, *how)
    try:
        found: Sequence[Tensor] = model(images).feature_maps
    finally:
        model.encoder = encoder
    return found


BACKBONES: dict[str, tuple[Callable[[], Any], dict[int, float], Any]] = {
    "LwDetr": (lw_detr, {1: 0.6, 2: 0.7, 4: 0.5}, ({1: 6, 2: 5, 4: 5}, (1, 4))),
    "RfDetr": (rf_detr, {0: 0.7, 1: 0.6, 3: 0.5}, ({0: 7, 1: 5, 3: 5}, (3,), 1)),
}


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_a_backbone(name: str) -> None:
    make, keep, how = BACKBONES[name]
    model, images = make(), noise(B, 3, 48, 48)
    dense = model(images).feature_maps
    for ours, true in zip(maps(model, images, {}, *how[1:]), dense, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-9)  # the oracle prunes nothing here
    same = rs_compile.optimize(model, dict.fromkeys(keep, 1.0), backend="eager")(images)
    assert all(torch.equal(a, b) for a, b in zip(same.feature_maps, dense, strict=True))
    handle = rs_compile.optimize(model, keep, backend="eager")
    pruned = handle(images)
    assert type(pruned) is type(model(images)) and pruned.hidden_states is None
    for ours, true, whole in zip(pruned.feature_maps, maps(model, images, *how), dense, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-9)
        assert ours.shape == whole.shape
    assert (pruned.feature_maps[-1] - dense[-1]).abs().max() > 1e-3
    fewer = images[:2].flip(-1)
    for ours, true in zip(handle(fewer).feature_maps, maps(model, fewer, *how), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("restore", ["change", "copy"])
@torch.no_grad()
def test_tokens_merge_within_their_window(restore: Restore) -> None:
    model, images = lw_detr(), noise(B, 3, 48, 48)
    layers, gone = model.encoder.layer, 3
    seen: list[Tensor] = []
    hook = layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    dense = model(images).feature_maps
    hook.remove()
    stream = layers[1](layers[0](seen[0]))
    for row, tokens in enumerate(stream):
        pairs = match(tokens, set(), gone, "stream", 0)
        stands = {at: at for at in pairs.left} | dict(pairs.merged)
        groups = [[at for at, to in stands.items() if to == left] for left in pairs.left]
        short = torch.stack([tokens[group].mean(0) for group in groups]).unsqueeze(0)
        merged = short[0]
        sizes = torch.tensor([float(len(group)) for group in groups], dtype=torch.float64).log()
        for layer in layers[2:4]:
            short = layer(short, attention_mask=sizes.expand(1, 1, len(groups), -1))
        places = [pairs.left.index(stands[at]) for at in range(len(tokens))]
        stream[row] = short[0, places] if restore == "copy" else tokens + (short[0] - merged)[places]
    wanted = layers[5](layers[4](stream))
    schedule = rs_compile.Schedule(merge={1: gone}, by=rs_compile.Stream(restore=restore))
    handle = rs_compile.optimize(model, schedule, backend="eager")
    found = handle(images).feature_maps[-1]
    ours = found.reshape(B, -1, 2, 3, 2, 3).permute(0, 2, 4, 3, 5, 1).reshape(wanted.shape)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)  # sizes are float32
    assert (found - dense[-1]).abs().max() > 1e-3
    assert [(row.tokens_in, row.tokens_out, row.sequences) for row in handle.report().blocks][1:5] == [
        (9, 6, 4), (6, 6, 4), (6, 9, 4), (9, 9, 4)
    ]  # fmt: skip


@torch.no_grad()
def test_frames_then_positions_in_the_batch() -> None:
    model, clips = video_prism(), noise(B, 4, 3, 24, 24)
    keep, left = {0: 0.6, 1: 0.8, 3: 0.5}, ({0: 6, 1: 5}, {0: 2})
    spatial = run_layers(model.spatial_layers, model.spatial_embeddings(clips, False), left[0])[-1]
    entry = model.temporal_embeddings(model.layernorm1(spatial), clips.shape, False)
    temporal = run_layers(model.temporal_layers, entry, left[1])[-1]
    wanted = model.layernorm2(temporal).reshape(B, 9, 4, -1).transpose(1, 2).flatten(1, 2)
    handle = rs_compile.optimize(model, keep, backend="eager")
    pruned, dense = handle(clips), model(clips)
    assert type(pruned) is type(dense)
    torch.testing.assert_close(pruned.last_spatial_hidden_state, spatial, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pruned.last_temporal_hidden_state, temporal, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pruned.last_hidden_state, wanted, rtol=1e-9, atol=1e-9)
    assert (wanted - dense.last_hidden_state).abs().max() > 1e-3
    same = rs_compile.optimize(model, dict.fromkeys(keep, 1.0), backend="eager")(clips)
    assert torch.equal(same.last_hidden_state, dense.last_hidden_state)


def test_where_no_layer_lies_between() -> None:
    rows = rs_compile.explain(lw_detr(), noise(B, 3, 48, 48)).rows
    assert [row.prunable for row in rows] == [False, True, True, False, True, True]
    assert [(row.tokens, row.sequences, row.until) for row in rows[1:3]] == [(9, 4, "the end of block 3")] * 2
    joins = "which splits the token axis, or its 4 sequences a sample, and later layers depend on it; no layer lies"
    assert joins in rows[0].reason


def test_no_map_shows_several_windows() -> None:
    with pytest.raises(Refusal, match=r"a sample has 4 sequences of tokens \(windows, frames\), and a map shows one"):
        rs_compile.score_maps(lw_detr(), noise(2, 3, 48, 48))


@pytest.mark.parametrize(("device", "sorts"), [("cuda", False), ("cpu", True)])
def test_on_a_gpu_windows_are_selected_without_a_sort(device: str, sorts: bool) -> None:
    """There are more rows than samples, and Inductor's sort of many rows takes ptxas minutes."""
    model = lw_detr()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, images = model.to(device), torch.zeros(2, 3, 48, 48, dtype=torch.float64, device=device)
    handle = rs_compile.optimize(model, {2: 0.7}, backend="eager")
    next(plans([handle], images))
    ops = {str(node.target) for node in handle.graph_module().graph.nodes}
    assert any("sort" in op for op in ops) == sorts
