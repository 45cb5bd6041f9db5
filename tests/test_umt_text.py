"""UMT's text side against transformers' own BERT with cross-attention, and its checkpoints key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from umt_world import TINY

from bench.models.umt import Size
from bench.models.umt_tasks import UMT_SIZES, UmtAnswering, UmtRetrieval, UmtSize, load_umt
from bench.models.umt_text import AnswerDecoder, TextEncoder, TextSize
from rs_compile.models import ModelError

SIZE = TextSize(24, 4, 3, fusion=2, vocabulary=40, positions=12)
SMALL = UmtSize(Size(24, 1, 3), SIZE, 16, frames=2, side=32)
IDS = torch.tensor([[1, 5, 9, 0, 0], [1, 7, 8, 3, 2], [1, 0, 0, 0, 0], [1, 9, 9, 4, 0]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()


def random(model: Any) -> Any:
    """Random weights, biases and norms included, in double precision."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return model.eval().double()


def bert(layers: int, cross: bool) -> Any:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=layers, num_attention_heads=3, intermediate_size=96,
        max_position_embeddings=12, is_decoder=cross, add_cross_attention=cross, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return (
        transformers.BertLMHeadModel(config).eval().double()
        if cross
        else transformers.BertModel(config).eval().double()
    )


def states(rows: int, length: int = 7) -> Tensor:
    return torch.randn(rows, length, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def test_the_text_pass_is_berts_first_layers() -> None:
    ours, theirs = random(TextEncoder(SIZE, 24)), bert(2, cross=False)
    weights = {k: v for k, v in ours.state_dict().items() if not k.startswith(("encoder.layer.2", "encoder.layer.3"))}
    missing = theirs.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and all(key.startswith("pooler") for key in missing.missing_keys)
    wanted = theirs(IDS, attention_mask=MASK.long()).last_hidden_state
    torch.testing.assert_close(ours.text(IDS, MASK)[MASK], wanted[MASK])


@torch.no_grad()
def test_the_fusion_pass_is_berts_layers_with_cross_attention() -> None:
    """transformers' decoder with a mask that is not causal is the multi-modal BERT: its first layers see no video."""
    ours, theirs = random(TextEncoder(SIZE, 24)), bert(4, cross=True).bert
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for layer in theirs.encoder.layer[:2]:  # without cross-attention, as below UMT's fusion layer
        layer.is_decoder = False
    hidden = torch.zeros(4, 1, 1, 5, dtype=torch.float64).masked_fill(~MASK[:, None, None], -1e30)
    x = theirs.embeddings(IDS)
    video = states(4)
    for layer in theirs.encoder.layer:
        x = layer(x, hidden.expand(-1, 1, 5, -1), video)
    found = ours.fuse(ours.text(IDS, MASK), MASK, video)
    torch.testing.assert_close(found[MASK], x[MASK])


@torch.no_grad()
def test_texts_of_one_video_share_its_keys() -> None:
    """Two texts a video in one call give what each gives alone, of whatever length the video is."""
    ours = random(TextEncoder(SIZE, 24))
    text, videos = ours.text(IDS, MASK), states(2, 5)
    together = ours.fuse(text, MASK, videos)
    alone = torch.cat([ours.fuse(text[i : i + 1], MASK[i : i + 1], videos[i // 2 : i // 2 + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone)
    assert (ours.fuse(text, MASK, videos[:, :4])[MASK] - together[MASK]).abs().max() > 0.01


@torch.no_grad()
def test_what_is_filled_up_is_not_read() -> None:
    ours, video = random(TextEncoder(SIZE, 24)), states(1)
    whole = ours.fuse(ours.text(IDS[:1], MASK[:1]), MASK[:1], video)[:, :3]
    short = ours.fuse(ours.text(IDS[:1, :3], MASK[:1, :3]), MASK[:1, :3], video)
    torch.testing.assert_close(whole, short)
    other = torch.where(MASK[:1], IDS[:1], 33)
    torch.testing.assert_close(ours.fuse(ours.text(other, MASK[:1]), MASK[:1], video)[:, :3], short)


@torch.no_grad()
def test_the_decoder_is_berts_language_model() -> None:
    ours, theirs = random(AnswerDecoder(SIZE)), bert(2, cross=True)
    theirs.load_state_dict(ours.state_dict())
    questions = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    read = states(2, 4)
    given = {"encoder_hidden_states": read.repeat_interleave(2, 0)}
    given["encoder_attention_mask"] = questions.long().repeat_interleave(2, 0)
    wanted = theirs(IDS, attention_mask=MASK.long(), **given).logits
    torch.testing.assert_close(ours(IDS, MASK, read, questions)[MASK], wanted[MASK])


def test_widths_of_text_and_video_may_differ() -> None:
    encoder = TextEncoder(SIZE, 10)
    layer: Any = encoder.encoder.layer[3]
    assert layer.crossattention.self.key.weight.shape == layer.crossattention.self.value.weight.shape == (24, 10)
    assert not hasattr(encoder.encoder.layer[1], "crossattention")
    with torch.no_grad():
        assert encoder.fuse(encoder.text(IDS, MASK), MASK, torch.randn(4, 6, 10)).shape == (4, 5, 24)


def keys(size: UmtSize, kind: type[nn.Module]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {key: value.shape for key, value in kind(size).state_dict().items()}


@pytest.mark.parametrize(("name", "retrieval", "answering"), [("b", 397, 479), ("l", 765, 899)])
def test_keys_of_the_published_sizes(name: str, retrieval: int, answering: int) -> None:
    size = UMT_SIZES[name]
    found, qa = keys(size, UmtRetrieval), keys(size, UmtAnswering)
    # the table of positions is the file's alone, once an encoder and once the decoder
    assert (len(found), len(qa)) == (retrieval - 1, answering - 2)
    C, W = size.text.dim, size.vision.dim
    first, last = size.text.fusion, size.text.depth - 1
    assert found["text_encoder.embeddings.word_embeddings.weight"] == (30522, C)
    assert found[f"text_encoder.encoder.layer.{first}.crossattention.self.key.weight"] == (C, W)
    assert f"text_encoder.encoder.layer.{first - 1}.crossattention.self.key.weight" not in found
    assert found[f"text_encoder.encoder.layer.{last}.intermediate.dense.weight"] == (4 * C, C)
    assert found["vision_proj.weight"] == (size.shared, W) and found["text_proj.bias"] == (size.shared,)
    assert found["itm_head.weight"] == (2, C) and found["temp"] == ()
    assert not any("pooler" in key or "clip" in key or "pos_embed" in key for key in found)
    layers = last - first + 1
    assert qa[f"text_decoder.bert.encoder.layer.{layers - 1}.crossattention.self.value.weight"] == (C, C)
    assert f"text_decoder.bert.encoder.layer.{layers}.output.dense.weight" not in qa
    assert qa["text_decoder.cls.predictions.decoder.weight"] == (30522, C)
    head = {"bias", "transform.dense.weight", "transform.dense.bias", "transform.LayerNorm.weight"}
    head |= {"transform.LayerNorm.bias", "decoder.weight", "decoder.bias"}
    assert {f"text_decoder.cls.predictions.{key}" for key in head} == {k for k in qa if ".cls." in k}
    absent = ("vision_proj", "text_proj", "temp", "itm_head", "vision_encoder.pool_norm")
    assert not any(key.startswith(absent) for key in qa)


def saved(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    torch.save({"model": weights, "epoch": 9}, tmp_path / "umt.pth")
    return tmp_path / "umt.pth"


def weights(model: nn.Module) -> dict[str, Tensor]:
    """With what a published file holds beside the model."""
    held = {key: value.clone() for key, value in model.state_dict().items()}
    held["text_encoder.embeddings.position_ids"] = torch.arange(12).unsqueeze(0)
    held["clip_teacher.conv1.weight"] = torch.ones(3)
    held["vision_encoder.clip_decoder.0.head.weight"] = torch.ones(3)
    return held


@pytest.mark.parametrize("kind", [UmtRetrieval, UmtAnswering])
def test_a_checkpoint_loads(tmp_path: Path, kind: Any) -> None:
    source, model = random(kind(SMALL)), kind(SMALL)
    held = weights(source)
    if kind is UmtAnswering:
        held["text_decoder.bert.embeddings.position_ids"] = torch.arange(12).unsqueeze(0)
    load_umt(model, saved(tmp_path, held))
    assert all(torch.equal(value, source.state_dict()[key].float()) for key, value in model.state_dict().items())


def test_a_checkpoint_of_pretraining_loads_for_retrieval_alone(tmp_path: Path) -> None:
    source, model = random(UmtRetrieval(SMALL)), UmtRetrieval(SMALL)
    held = {key.replace("text_encoder.", "text_encoder.bert."): value for key, value in weights(source).items()}
    held["text_encoder.cls.predictions.bias"] = torch.ones(40)
    path = saved(tmp_path, held)
    load_umt(model, path)
    assert all(torch.equal(value, source.state_dict()[key].float()) for key, value in model.state_dict().items())
    with pytest.raises(ModelError, match="is a file of pretraining, which has no answer decoder"):
        load_umt(UmtAnswering(SMALL), path)


def fault(tmp_path: Path, held: dict[str, Tensor], model: Any = None) -> str:
    with pytest.raises(ModelError) as caught:
        load_umt(UmtRetrieval(SMALL) if model is None else model, saved(tmp_path, held))
    return str(caught.value)


def test_a_key_that_does_not_fit_is_named(tmp_path: Path) -> None:
    held = weights(UmtRetrieval(SMALL))
    key = "text_encoder.encoder.layer.3.crossattention.self.query.bias"
    assert f"missing in the file: {key}" in fault(tmp_path, {k: v for k, v in held.items() if k != key})
    assert "left over in the file: text_encoder.pooler.dense.bias" in fault(
        tmp_path, {**held, "text_encoder.pooler.dense.bias": torch.ones(24)}
    )
    assert "of another shape: itm_head.bias is [3], the model's [2]" in fault(
        tmp_path, {**held, "itm_head.bias": torch.ones(3)}
    )
    # answering's file for retrieval
    said = fault(tmp_path, weights(UmtAnswering(SMALL)))
    assert (
        "missing in the file: temp, vision_encoder.pool_norm" in said and "left over in the file: text_decoder" in said
    )
    assert "so it is no checkpoint of a whole UMT" in fault(tmp_path, {"head.weight": torch.ones(3)})


def test_sizes_are_told_apart_by_width(tmp_path: Path) -> None:
    """Two of the published links lead to UMT-B's file in place of UMT-L's."""
    held = weights(UmtRetrieval(SMALL))
    held["vision_encoder.encoder.patch_embed.proj.weight"] = torch.ones(768, 3, 1, 16, 16)
    said = fault(tmp_path, held)
    assert "has a vision encoder of width 768, that of UMT-B, the model one of 24" in said and "published links" in said


def test_a_tied_weight_that_is_two(tmp_path: Path) -> None:
    model = UmtAnswering(SMALL)
    held = {**weights(model), "text_decoder.cls.predictions.decoder.bias": torch.ones(40)}
    said = fault(tmp_path, held, model)
    assert "decoder.bias and text_decoder.cls.predictions.bias differ" in said
    decoder = model.text_decoder
    assert decoder.cls.predictions.decoder.weight is decoder.bert.embeddings.word_embeddings.weight


@torch.no_grad()
def test_matching_is_the_raw_logit_of_the_second_class() -> None:
    """Read at the text's first token, not made a probability; no temperature in similarities either."""
    model = random(UmtRetrieval(SMALL))
    text, video = model.text_encoder.text(IDS, MASK), states(4)
    first = model.text_encoder.fuse(text, MASK, video)[:, 0]
    wanted = (first @ model.itm_head.weight.T + model.itm_head.bias)[:, 1]
    torch.testing.assert_close(model.matching(text, MASK, video), wanted.float())
    torch.testing.assert_close(
        model.projected(text), nn.functional.normalize(model.text_proj(text[:, 0]), dim=1).float()
    )


@torch.no_grad()
def test_pooling_by_tokens_and_by_frames() -> None:
    """Each frame's mean is normalised, projected and compared by itself; the mean of all tokens is another."""
    model = random(UmtRetrieval(TINY))
    tokens = torch.randn(2, 4 * 16, 64, dtype=torch.float64)
    text = nn.functional.normalize(torch.randn(5, 32, dtype=torch.float64).float(), dim=-1)
    norm, proj = model.vision_encoder.pool_norm, model.vision_proj
    cosines = []
    for t in range(4):
        frame = proj(norm(tokens[:, 16 * t : 16 * t + 16].mean(1))).float()
        cosines.append(nn.functional.cosine_similarity(text.unsqueeze(1), frame.unsqueeze(0), dim=-1))
    torch.testing.assert_close(text @ model.pooled(tokens, 4).T, torch.stack(cosines).mean(0))
    whole = proj(norm(tokens.mean(1))).float()
    wanted = nn.functional.cosine_similarity(text.unsqueeze(1), whole.unsqueeze(0), dim=-1)
    torch.testing.assert_close(text @ model.pooled(tokens).T, wanted)
    assert (wanted - torch.stack(cosines).mean(0)).abs().max() > 0.01
