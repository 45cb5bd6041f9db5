"""From what a user names to what can be run: timm models, checkpoints, image files, class names."""

from __future__ import annotations

import contextlib
import difflib
import math
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn

from passes.graph.base import CompileError
from passes.graph.codes import Code
from rs_compile.errors import first_line
from rs_compile.hub import hub_or_cache

_HUBS = ("hf-hub:", "hf_hub:", "local-dir:", "local_dir:")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # what a folder is searched for
_SHOWN = 3  # keys named in a message


class ModelError(CompileError):
    """A model name, a checkpoint or a number of classes that does not fit; says what to write instead."""

    family = Code.MODEL_FILE


class ImageError(CompileError):
    """A file that cannot be read as an image."""

    family = Code.MODEL_FILE


def build(
    name: str,
    *,
    img_size: int | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
    checkpoint: Path | None = None,
) -> nn.Module:
    """A timm model in eval mode, fp32.

    Args:
        name: as timm writes it, "deit_small_patch16_224", with or without a tag.
        img_size: side of the images in pixels; None for the checkpoint's own, which its table of positions tells, else
            the model's.
        num_classes: of the classifier; 0 for features; None for the model's own.
        pretrained: weights from timm's hub (its cache first). Otherwise, without checkpoint, random weights.
        checkpoint: a .safetensors file or one of torch.save's, of a state dict.

    Raises:
        ModelError: no such model, weights that cannot be had, or that do not fit.
    """
    _check_name(name)
    options: dict[str, Any] = {}
    if num_classes is not None:
        options["num_classes"] = num_classes
    model = _create(name, pretrained, img_size, options)
    if checkpoint is not None:
        weights = read_weights(checkpoint)
        side = None if img_size is not None else _trained_size(model, weights)
        if side is not None:
            model = _create(name, False, side, options)
            # what says how pictures are resized
            config: Any = getattr(model, "pretrained_cfg", {})
            model.__dict__["pretrained_cfg"] = {**config, "input_size": (3, side, side)}
        load_weights(model, weights, checkpoint)
    return model.eval()


def input_size(model: nn.Module, img_size: int | None = None) -> tuple[int, int, int]:
    """Channels, height and width of the images that a timm model was made for, or of `img_size` pixels."""
    channels, height, width = resolve_model_data_config(model)["input_size"]
    return (channels, height, width) if img_size is None else (channels, img_size, img_size)


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Copies a checkpoint's weights into `model`, cast to the model's dtypes (fp16 files into fp32 models).

    A state dict under "model" or "state_dict" (as training scripts save it), or with "module." or "model."
    before every key, is unwrapped; averaged weights ("model_ema") go first, as in timm.

    Raises:
        ModelError: the file cannot be read, holds more than weights, or does not fit; names the keys.
    """
    load_weights(model, read_weights(path), path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A checkpoint's state dict, unwrapped as `load_checkpoint` says, nothing loaded.

    Raises:
        ModelError: the file cannot be read, or holds more than weights.
    """
    return _unwrapped(_read(path), path)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copies weights, read from `path`, into `model`; its keys and shapes must be theirs.

    Raises:
        ModelError: they do not fit; names the keys.
    """
    own = model.state_dict()
    faults = []
    if missing := [key for key in own if key not in weights]:
        faults.append(f"missing in the file: {_named(missing)}")
    if left := [key for key in weights if key not in own]:
        faults.append(f"left over in the file: {_named(left)}")
    unlike = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if unlike:
        shapes = [f"{k} is {list(weights[k].shape)}, the model's {list(own[k].shape)}" for k in unlike]
        faults.append(f"of another shape: {_named(shapes)}")
    if faults:
        advice = _advice(model, {*missing, *left, *unlike})
        raise ModelError(f"{path} does not fit {type(model).__name__}; " + "; ".join(faults) + f"\n  way out: {advice}")
    model.load_state_dict(weights, strict=True)


def load_images(paths: Sequence[Path], model: nn.Module, img_size: int | None = None) -> Tensor:
    """Image files as the model wants them, through timm's own evaluation transform.

    Returns:
        float32 [len(paths), channels, height, width], resized, cropped and normalised.

    Raises:
        ImageError: a file is not there, or is no image.
    """
    transform, colours = evaluation_transform(model, img_size)
    return torch.stack([transform(read_image(path, colours)) for path in paths])


def pictures_in(folder: Path) -> list[Path]:
    """Paths of the pictures in a folder and those below it, sorted.

    Raises:
        ImageError: it is no folder, or has none.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder} is no folder; pass one with pictures ({', '.join(PICTURES)})")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
    if not paths:
        raise ImageError(f"{folder} has no pictures; pass a folder with some ({', '.join(PICTURES)})")
    return paths


def evaluation_transform(model: nn.Module, img_size: int | None = None) -> tuple[Callable[[Image.Image], Tensor], str]:
    """timm's own evaluation transform of a picture to float32 [channels, height, width], and PIL's mode of pictures.

    Raises:
        ImageError: the model wants neither 1 nor 3 channels.
    """
    size = input_size(model, img_size)
    colours = {1: "L", 3: "RGB"}.get(size[0])
    if colours is None:
        raise ImageError(f"the model wants {size[0]} channels; image files have 1 or 3")
    return create_transform(**resolve_model_data_config(model, args={"input_size": size})), colours


def built_size(model: nn.Module) -> int | None:
    """Side of the images that a timm transformer was built for, in pixels, which may not be its weights' own."""
    side = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return side[0] if isinstance(side, tuple) and len(set(side)) == 1 else None


def class_names(classes: int) -> list[str]:
    """What the classes of a classifier are called: ImageNet's names where timm knows them, else numbers."""
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        return [f"class {i}" for i in range(classes)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(classes)]


def _trained_size(model: nn.Module, weights: Mapping[str, Tensor]) -> int | None:
    """Side of the images, pixels, that weights were made with; None where it is the model's, or no table tells it."""
    own, table = getattr(model, "pos_embed", None), weights.get("pos_embed")
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if not isinstance(own, Tensor) or table is None or own.dim() != 3 or table.dim() != 3 or not patches or not patch:
        return None
    prefix = own.shape[1] - patches  # of the tokens that have a place in the table
    side = math.isqrt(max(0, table.shape[1] - prefix))
    if table.shape[1] == own.shape[1] or side == 0 or side * side != table.shape[1] - prefix or len(set(patch)) > 1:
        return None
    return int(side * patch[0])


def _check_name(name: str) -> None:
    if name.startswith(_HUBS):
        return
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=5, cutoff=0.5)
        advice = f"nearest: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise ModelError(f"timm has no model {base!r}; {advice}")
    known = [full for full in timm.list_pretrained(f"{base}.*") if full.partition(".")[0] == base]
    if tag and name not in known:
        raise ModelError(f"timm has no weights {name!r}; it has {', '.join(known) or base + ' without any'}")


def _create(name: str, pretrained: bool, img_size: int | None, options: dict[str, Any]) -> nn.Module:
    hub = pretrained or name.startswith(_HUBS)
    with hub_or_cache() if hub else contextlib.nullcontext(True) as online, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # timm's, on renamed models
        try:
            if img_size is not None:
                try:
                    return timm.create_model(name, pretrained=pretrained, img_size=img_size, **options)
                except TypeError as error:
                    if "img_size" not in str(error):
                        raise
            # a convolutional net takes any size, and no argument for it
            return timm.create_model(name, pretrained=pretrained, **options)
        except Exception as error:  # timm, the hub's client and its HTTP library each have their own
            if hub:
                why = first_line(error) if online else "the hub cannot be reached, and its cache has none"
                raise ModelError(
                    f"the weights of {name} cannot be had: {why}\n"
                    "  way out: connect to the hub, or fetch the file elsewhere and pass --checkpoint FILE"
                ) from error
            raise ModelError(f"timm cannot build {name} like this: {first_line(error)}") from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"there is no checkpoint file {path}; pass a .safetensors or torch.save file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a file of another kind the unpickler raises whatever its bytes lead to
        # torch's words for a class or function that is no tensor's
        if isinstance(error, pickle.UnpicklingError) and ("GLOBAL" in str(error) or "allowlisted" in str(error)):
            raise ModelError(
                f"{path} holds more than weights, and loading it could run code that it carries; not loaded\n"
                "  way out: where you trust it, load it and save the weights alone, "
                "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
            ) from error
        told = isinstance(error, OSError | RuntimeError | safetensors.SafetensorError)
        reason = first_line(error) if told else "it is no file of torch.save's"
        raise ModelError(
            f"{path} cannot be read as weights: {reason}\n"
            "  way out: pass a complete .safetensors file, or a state dict that torch.save wrote"
        ) from error


def _unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next((content[w] for w in _WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"{path} holds {_kind(content)}, not a state dict; save model.state_dict() instead")
    odd = [f"{key!r} ({_kind(v)})" for key, v in content.items() if not isinstance(v, Tensor)]
    if odd:
        raise ModelError(
            f"{path} holds no plain state dict: no tensors under {_named(odd)}; save model.state_dict(), "
            'alone or under "model" or "state_dict"'
        )
    weights = {str(key): value for key, value in content.items()}
    while (prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in weights)), None)) is not None:
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _advice(model: nn.Module, keys: set[str]) -> str:
    # which layer classifies is in timm's own description of the model
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    advice = []
    if any(key.startswith(f"{head}.") for key in keys for head in heads):
        advice.append("--num-classes as the checkpoint's (0 for none)")
    if any("pos_embed" in key for key in keys):
        advice.append("--img-size as the checkpoint was trained with, where it is not square")
    return " and ".join(advice) if advice else "name the model that the checkpoint was made from"


def read_image(path: Path | BytesIO, colours: str) -> Image.Image:
    """The decoded file, or its bytes, in PIL's mode `colours`, "RGB" or "L".

    Raises:
        ImageError: it is not there, or is no image; what PIL raises is its cause.
    """
    try:
        with Image.open(path) as image:
            return image.convert(colours)
    except FileNotFoundError:
        raise ImageError(f"there is no image file {path}") from None
    # a truncated or hostile file raises any of these
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{path} cannot be read as an image ({first_line(error)}); pass a PNG, JPEG, WebP or the like"
        ) from error


def _named(things: Iterable[str]) -> str:
    listed = list(things)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _kind(value: Any) -> str:
    return "nothing" if isinstance(value, Mapping) and not value else type(value).__name__
