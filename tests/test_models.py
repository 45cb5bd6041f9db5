"""Names, checkpoints and image files: what loads, and the words of what does not."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from rs_compile.models import (
    ImageError,
    ModelError,
    build,
    class_names,
    input_size,
    load_checkpoint,
    load_images,
)

TINY: dict[str, Any] = {"img_size": 32, "num_classes": 5}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn_like(value) for name, value in build("test_vit", **TINY).state_dict().items()}


def refusal(model: nn.Module, path: Path) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_checkpoint(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return caught.value.text


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def prefixed(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in weights.items()}


def test_a_model_by_name() -> None:
    model = build("test_vit", **TINY)
    assert not model.training
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_img_size_of_a_convolutional_net_is_that_of_its_images() -> None:
    model = build("test_resnet", img_size=96)
    assert input_size(model) == (3, 160, 160) and input_size(model, 96) == (3, 96, 96)


def test_an_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"timm has no model 'deit_smal_patch16'; nearest: deit_small_patch16"):
        build("deit_smal_patch16")
    with pytest.raises(ModelError, match=r"no model 'qqqxyzzy'; timm.list_models\(\) lists them"):
        build("qqqxyzzy")


def test_an_unknown_tag_lists_the_known() -> None:
    with pytest.raises(ModelError, match=r"no weights 'test_vit.mine'; it has test_vit.r160_in1k"):
        build("test_vit.mine")


def test_what_timm_cannot_build_is_told_in_its_words() -> None:
    with pytest.raises(ModelError, match="timm cannot build nest_tiny like this: First level blocks don't fit"):
        build("nest_tiny", img_size=100)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_checkpoint_of_any_precision(weights: dict[str, Any], tmp_path: Path, suffix: str, dtype: Any) -> None:
    half = {name: value.to(dtype) for name, value in weights.items()}
    path = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(half, path)
    else:
        torch.save(half, path)
    model = build("test_vit", **TINY, checkpoint=path)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, half[name].float()), name


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"model": w},
        lambda w: {"epoch": 3, "state_dict": OrderedDict(w), "optimizer": {"lr": 0.1}},
        lambda w: {"state_dict": prefixed(w, "module.")},
        lambda w: {"state_dict": prefixed(w, "model.")},
        lambda w: {"model": prefixed(w, "module._orig_mod.")},
        lambda w: {"model": {"left": torch.zeros(1)}, "model_ema": w},
    ],
)
def test_wrappings_of_training_scripts(weights: dict[str, Any], tmp_path: Path, wrap: Any) -> None:
    model = build("test_vit", **TINY, checkpoint=saved(tmp_path / "w.pth", wrap(weights)))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_wrong_keys_are_named(weights: dict[str, Any], tmp_path: Path) -> None:
    model = build("test_vit", **TINY)
    content = {k: v for k, v in weights.items() if k != "norm.weight"} | {"extra.bias": torch.zeros(3)}
    text = refusal(model, saved(tmp_path / "w.pth", content))
    assert "missing in the file: norm.weight; left over in the file: extra.bias" in text
    assert "way out: name the model that the checkpoint was made from" in text


def test_many_wrong_keys_are_counted(tmp_path: Path) -> None:
    model = build("test_vit", **TINY)
    text = refusal(model, saved(tmp_path / "w.pth", {"a": torch.zeros(1)}))
    count = len(model.state_dict()) - 3
    assert f"missing in the file: cls_token, pos_embed, patch_embed.proj.weight and {count} more" in text


def test_another_number_of_classes_says_so(weights: dict[str, Any], tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", weights)
    text = refusal(build("test_vit", img_size=32, num_classes=7), path)
    assert "head.weight is [5, 64], the model's [7, 64]" in text
    assert "way out: --num-classes as the checkpoint's" in text
    features = refusal(build("test_vit", img_size=32, num_classes=0), path)
    assert "left over in the file: head.weight, head.bias" in features and "--num-classes" in features


def test_another_image_size_says_so(weights: dict[str, Any], tmp_path: Path) -> None:
    text = refusal(build("test_vit", img_size=64, num_classes=5), saved(tmp_path / "w.pth", weights))
    assert "pos_embed is [1, 5, 64], the model's [1, 17, 64]" in text
    assert "way out: --img-size as the checkpoint was trained with" in text


def test_the_image_size_of_a_checkpoint_is_read_from_its_positions(weights: dict[str, Any], tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", weights)
    model = build("test_vit", num_classes=5, checkpoint=path)  # timm's own is 160
    assert torch.equal(model.pos_embed, weights["pos_embed"]) and input_size(model) == (3, 32, 32)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(ModelError, match=r"pos_embed is \[1, 5, 64\], the model's \[1, 17, 64\]"):
        build("test_vit", img_size=64, num_classes=5, checkpoint=path)  # what the user says goes first


class Code:
    """Pickled, it would run code on loading."""

    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Code, "ran", True)


@pytest.mark.parametrize("how", ["torch", "pickle", "module"])
def test_a_pickle_with_code_is_not_run(tmp_path: Path, how: str) -> None:
    path = tmp_path / "w.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Code(), protocol=2))
    else:
        torch.save(Code() if how == "torch" else nn.Linear(2, 2), path)
    text = refusal(build("test_vit", **TINY), path)
    assert "holds more than weights, and loading it could run code that it carries; not loaded" in text
    assert "way out: where you trust it, load it and save the weights alone" in text
    assert not Code.ran


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"this is no checkpoint at all", b"PK\x03\x04 cut"])
def test_unreadable_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    text = refusal(build("test_vit", **TINY), tmp_path / name)
    assert "cannot be read as weights: " in text and "way out: pass a complete .safetensors file" in text


def test_a_truncated_checkpoint(weights: dict[str, Any], tmp_path: Path) -> None:
    for name, path in (("torch", tmp_path / "w.pt"), ("safetensors", tmp_path / "w.safetensors")):
        (torch.save if name == "torch" else safetensors.torch.save_file)(weights, path)
        path.write_bytes(path.read_bytes()[:5000])
        assert "cannot be read as weights" in refusal(build("test_vit", **TINY), path)


def test_an_absent_file(tmp_path: Path) -> None:
    text = refusal(build("test_vit", **TINY), tmp_path / "none.pt")
    assert text == f"there is no checkpoint file {tmp_path}/none.pt; pass a .safetensors or torch.save file"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds list, not a state dict"),
        ({}, "holds nothing, not a state dict"),
        ({"epoch": 3, "net": {}}, "no tensors under 'epoch' (int), 'net' (nothing)"),
    ],
)
def test_a_file_without_state_dict(tmp_path: Path, content: Any, words: str) -> None:
    assert words in refusal(build("test_vit", **TINY), saved(tmp_path / "w.pt", content))


def test_pretrained_weights_come_from_the_hub_or_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"the weights of test_vit cannot be had: .*\n.*pass --checkpoint FILE"):
        build("test_vit", pretrained=True)
    torch.manual_seed(5)
    weights = build("test_vit").state_dict()
    repository, commit = tmp_path / "models--timm--test_vit.r160_in1k", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    safetensors.torch.save_file(weights, repository / "snapshots" / commit / "model.safetensors")
    model = build("test_vit", pretrained=True)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def picture(path: Path, mode: str = "RGB") -> Path:
    pixels = np.random.RandomState(0).randint(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_images_through_timms_transform(tmp_path: Path) -> None:
    model = build("test_vit", **TINY)
    paths = [picture(tmp_path / "a.png"), picture(tmp_path / "b.jpg"), picture(tmp_path / "c.png", "RGBA")]
    images = load_images([*paths, picture(tmp_path / "d.gif", "P")], model, 32)
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32
    assert torch.equal(images[0], images[2])
    assert images.min() < 0  # normalised
    assert load_images(paths[:1], build("test_vit")).shape == (1, 3, 160, 160)


@pytest.mark.parametrize("content", [b"", b"no image", "cut"])
def test_an_unreadable_image(tmp_path: Path, content: Any) -> None:
    path = picture(tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:500] if content == "cut" else content)
    with pytest.raises(ImageError, match=re.escape(f"{path} cannot be read as an image")):
        load_images([path], build("test_vit", **TINY), 32)


def test_an_absent_image_and_a_directory(tmp_path: Path) -> None:
    model = build("test_vit", **TINY)
    with pytest.raises(ImageError, match="there is no image file"):
        load_images([tmp_path / "none.png"], model, 32)
    with pytest.raises(ImageError, match="cannot be read as an image"):
        load_images([tmp_path], model, 32)


def test_class_names() -> None:
    names = class_names(1000)
    assert len(names) == 1000 and names[0].startswith("tench") and names[999].startswith("toilet tissue")
    assert class_names(3) == ["class 0", "class 1", "class 2"]
