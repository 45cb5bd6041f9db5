"""Dual encoders on small random models of transformers: features against the library's own whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from dual_encoders import CROP, FRAMES, TEXT, VISION, clip, save, tokenizer, xclip
from torch import Tensor
from torch.nn import functional as F

from bench.evaluate.encoders import (
    ClipEncoder,
    Processor,
    TextTower,
    XClipEncoder,
    load_encoder,
    with_vision,
)
from bench.evaluate.journal import EvaluationError, fingerprint
from rs_compile import optimize
from rs_compile.schedule import removed

TEXTS = ["red fish", "a", "two birds in the sky that fly"]


@pytest.fixture
def clips() -> Tensor:
    return torch.randn(2, FRAMES, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_clip_on_one_frame_is_clip(clips: Tensor) -> None:
    model = clip()
    encoder = ClipEncoder(model, tokenizer())
    tokens = tokenizer()(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    whole = model(pixel_values=clips[:, 0], **tokens)
    videos, texts = encoder.encode_videos(clips[:, :1]), encoder.encode_texts(TEXTS)
    torch.testing.assert_close(videos, whole.image_embeds)
    torch.testing.assert_close(F.normalize(texts, dim=1), whole.text_embeds)
    mean = sum(encoder.encode_videos(clips[:, i : i + 1]) for i in range(FRAMES)) / FRAMES
    torch.testing.assert_close(encoder.encode_videos(clips), mean)


@torch.no_grad()
def test_siglip_is_clip_style(clips: Tensor) -> None:
    text = {**TEXT, "vocab_size": 64, "pad_token_id": 53, "eos_token_id": 53, "bos_token_id": 52}
    model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=text)).eval()
    encoder = ClipEncoder(model, tokenizer())
    assert encoder.encode_videos(clips).shape == encoder.encode_texts(TEXTS[:2]).shape == (2, 32)


@torch.no_grad()
def test_xclip_without_its_prompts_is_xclip(clips: Tensor) -> None:
    model = xclip()
    model.prompts_generator.alpha.zero_()
    encoder = XClipEncoder(model, tokenizer())
    tokens = tokenizer()(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    whole = model(pixel_values=clips, **tokens)
    videos, texts = encoder.encode_videos(clips), encoder.encode_texts(TEXTS)
    torch.testing.assert_close(F.normalize(videos, dim=1), whole.video_embeds)
    torch.testing.assert_close(F.normalize(texts, dim=1), whole.text_embeds[0])
    with pytest.raises(EvaluationError, match="this X-CLIP model takes 4 frames, not 3; pass --frames 4"):
        encoder.encode_videos(clips[:, :3])


@torch.no_grad()
def test_the_vision_tower_is_replaced(clips: Tensor) -> None:
    encoder = ClipEncoder(clip(), tokenizer())
    dense = encoder.encode_videos(clips)
    pruned = with_vision(encoder, lambda tower: optimize(tower, {0: 0.5}, backend="eager"))
    found = pruned.encode_videos(clips)
    assert not torch.allclose(found, dense) and F.cosine_similarity(found, dense).min() > 0.5
    assert [row.tokens_out for row in pruned.model.vision_model.report().blocks] == [9, 9]
    assert torch.equal(pruned.encode_texts(TEXTS), encoder.encode_texts(TEXTS))
    assert torch.equal(encoder.encode_videos(clips), dense)  # left as it was
    assert pruned.model.visual_projection is encoder.model.visual_projection
    assert fingerprint(pruned) == fingerprint(encoder)


@torch.no_grad()
def test_a_pruned_xclip_tower_is_xclip_pruned_by_hand(clips: Tensor) -> None:
    tower, ratios = xclip().vision_model, {0: 0.6, 1: 0.5}
    frames = clips.flatten(0, 1)
    x = tower.pre_layernorm(tower.embeddings(frames))
    for i, layer in enumerate(tower.encoder.layers):
        branch: list[Tensor] = []
        streams: list[Tensor] = []
        hooks = [
            layer.mlp.register_forward_hook(lambda _m, _i, out, to=branch: to.append(out)),
            layer.layer_norm2.register_forward_pre_hook(lambda _m, args, to=streams: to.append(args[0])),
        ]
        x = layer(x, None)
        for hook in hooks:
            hook.remove()
        if i in ratios:
            shift = (branch[0] - streams[0]).norm(dim=2)
            shift[:, 0] = torch.inf  # the class token
            count = x.shape[1] - removed(x.shape[1], ratios[i])
            kept = shift.topk(count, dim=1).indices.sort(dim=1).values
            x = torch.stack([sample[index] for sample, index in zip(x, kept, strict=True)])
    wanted = tower.post_layernorm(x[:, 0])
    found = optimize(tower, ratios, backend="eager")(pixel_values=frames).pooler_output
    assert x.shape[1] == 6
    torch.testing.assert_close(found, wanted)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(clip(), transformers.CLIPImageProcessor(**CROP), folder / "clip")
    save(xclip(), transformers.VideoMAEImageProcessor(**CROP), folder / "xclip")
    save(transformers.ViTModel(transformers.ViTConfig(**VISION)), transformers.ViTImageProcessor(), folder / "vit")
    return folder


@pytest.mark.parametrize(("name", "kind"), [("clip", ClipEncoder), ("xclip", XClipEncoder)])
@torch.no_grad()
def test_a_saved_encoder(saved: Path, name: str, kind: type[TextTower], clips: Tensor) -> None:
    encoder, transform = load_encoder(str(saved / name))
    assert type(encoder) is kind and not encoder.model.training
    model = {"clip": clip, "xclip": xclip}[name]()
    torch.testing.assert_close(encoder.encode_videos(clips), kind(model, tokenizer()).encode_videos(clips))
    frames = torch.randint(0, 255, (FRAMES, 40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = transform(frames)
    assert pixels.shape == (FRAMES, 3, 32, 32) and pixels.dtype == torch.float32
    alone = torch.cat([transform(frames[i : i + 1]) for i in range(FRAMES)])
    torch.testing.assert_close(pixels, alone)
    grey = transform(torch.full((1, 32, 32, 3), 255, dtype=torch.uint8))
    mean, deviation = transform.processor.image_mean[2], transform.processor.image_std[2]
    assert grey[0, 2].mean().item() == pytest.approx((1 - mean) / deviation, rel=1e-4)


def test_random_weights_are_the_same_each_time(saved: Path) -> None:
    one, two = (load_encoder(str(saved / "clip"), random_weights=True)[0] for _ in range(2))
    assert fingerprint(one) == fingerprint(two) != fingerprint(load_encoder(str(saved / "clip"))[0])


def test_encoders_that_cannot_be_loaded(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"there is no folder .*nowhere; .* or pass --pretrained"):
        load_encoder(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match=r"empty cannot be loaded: .*\n  way out: give a folder with config"):
        load_encoder(str(tmp_path / "empty"))
    with pytest.raises(EvaluationError, match="vit is a ViTModel, no dual encoder"):
        load_encoder(str(saved / "vit"))
    for file in (saved / "clip").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(EvaluationError, match=r"1 are missing, first visual_projection\.weight"):
        load_encoder(str(tmp_path))


def test_a_transform_says_what_it_is(saved: Path) -> None:
    assert repr(Processor(transformers.CLIPImageProcessor())) != repr(load_encoder(str(saved / "clip"))[1])
