"""One model of every family in timm: the smallest of those whose names differ in sizes and numbers only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from bench.coverage.subject import Subject

_SIZES = [  # from small to large
    *("femto", "atto", "pico", "nano", "xxxs", "xxs", "xs", "xt", "n", "tiny", "ti", "t", "mini", "wee", "pwee"),
    *("dwee", "little", "dlittle", "dpwee", "small", "s", "medium", "mediumd", "betwixt", "m", "intern300m", "so150m"),
    *("so150m2", "so400m", "base", "b", "large", "l", "xlarge", "xl", "xxlarge", "huge", "h", "giant", "giantopt"),
    *("gigantic", "enormous", "g", "1b", "2b", "3b", "5b", "7b"),
]
_NUMBERS = re.compile(
    r"(patch|window|reg|r|s|p|w|x|b|c|d|g|h|m|k|t|n|l)?\d+[a-z]?|\d+x\d+d|\d+(m|mf|gf|d|t|b)|\d+_\d+|v\d+[ab]?"
)
_SPELT_OUT = ("vision_transformer", "eva", "beit", "deit", "naflexvit", "gemma4_vit", "qwen3_vit", "deepseek_vit")
_DEPTH = 3
_SIDE, _LARGE = 224, 300
_SIDES = {
    "qwen3_vit_88m": 768,  # its own: as many tokens as a linear layer has channels
    "gemma4_vit_167m_enc": 240,  # a multiple of its pooled patch
}


def family(name: str, module: str) -> str:
    """What a model's name says beside its size: all of it for plain transformers, the first word for the others."""
    words = name.split("_")
    if module.startswith(_SPELT_OUT):
        kept = [w for w in words[1:] if w not in _SIZES and not _NUMBERS.fullmatch(w)]
        return "_".join([words[0], *kept])
    return re.sub(r"(?<=[a-z])\d+[a-z]*$", "", words[0])


def subjects() -> Iterator[Subject]:
    """A subject for every family, in the order of the library."""
    families: dict[tuple[str, str], list[str]] = {}
    for name in timm.list_models():
        module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        if not name.startswith("test_"):
            families.setdefault((module, family(name, module)), []).append(name)
    for (_, title), names in families.items():
        name = min(names, key=_rank)
        yield Subject("timm", title, name, partial(_build, name), partial(_images, name))


def _rank(name: str) -> tuple[int, list[int], str]:
    words = name.split("_")
    sizes = [_SIZES.index(size) for w in words[1:] if (size := w if w in _SIZES else w.rstrip("0123456789")) in _SIZES]
    return (min(sizes, default=_SIZES.index("small")), [int(n) for n in re.findall(r"\d+", name)], name)


def _build(name: str) -> nn.Module:
    """The model in eval mode, of few layers and of a small image where its constructor takes them."""
    sizes: dict[str, Any] = {"img_size": _side(name)}
    for options in ({"depth": _DEPTH, **sizes}, {"depth": _DEPTH}, sizes):
        try:
            return timm.create_model(name, pretrained=False, **options).eval()
        except (TypeError, ValueError, AssertionError, IndexError, RuntimeError):
            continue
    return timm.create_model(name, pretrained=False).eval()


def _side(name: str) -> int:
    """Rows and columns of the image: the model's own, or fewer where those are many."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    own = config.input_size[1] if config is not None else _SIDE
    return _SIDES.get(name, own if own <= _LARGE else _SIDE)


def _images(name: str, batch: int) -> Tensor:
    return torch.randn(batch, 3, _side(name), _side(name), generator=torch.Generator().manual_seed(0))
