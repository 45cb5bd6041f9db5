"""The digits and the small ViT that the tables measure accuracy with."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from sklearn import datasets
from torch import nn

from bench.digits import WEIGHTS, Split, digits_vit, load_digits, load_pretrained_digits_vit


@pytest.fixture(scope="module")
def pretrained() -> nn.Module:
    return load_pretrained_digits_vit()


@pytest.mark.parametrize(("split", "count"), [("train", 1201), ("test", 596)])
def test_shapes_and_range(split: Split, count: int) -> None:
    images, labels = load_digits(split)
    assert images.shape == (count, 1, 40, 40) and images.dtype == torch.float32
    assert labels.shape == (count,) and labels.dtype == torch.int64
    assert images.min() == 0.0 and images.max().item() == pytest.approx(1.0, abs=1e-6)


def test_the_split_is_the_same_on_every_call_and_whatever_the_seed() -> None:
    torch.manual_seed(0)
    first = load_digits("test")
    torch.manual_seed(1)
    second = load_digits("test")
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_the_split_is_the_one_that_the_weights_were_trained_without() -> None:
    images, labels = load_digits("test")
    assert labels.bincount().tolist() == [59, 60, 59, 61, 60, 60, 60, 59, 58, 60]
    scans = torch.from_numpy(datasets.load_digits().images[[3, 5, 7, 13, 16, 19, 22, 26]] / 16).float()
    # five pixels stand for one, and bilinear enlarging leaves the middle one as it was
    torch.testing.assert_close(images[:8, 0, 2::5, 2::5], scans)


def test_no_test_digit_is_a_training_digit() -> None:
    both = torch.cat([load_digits("train")[0], load_digits("test")[0]])
    assert len(both.flatten(1).unique(dim=0)) == 1797  # not even as pixels


def test_an_unknown_split_is_refused() -> None:
    unknown: Any = "val"
    with pytest.raises(ValueError, match=r"split is 'val'; it is 'train' or 'test'"):
        load_digits(unknown)


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_digits("test")


def test_the_model_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert load_pretrained_digits_vit()(torch.zeros(2, 1, 40, 40)).shape == (2, 10)


def test_every_weight_comes_from_the_file(pretrained: nn.Module) -> None:
    torch.manual_seed(7)
    fresh = digits_vit().state_dict()
    loaded = pretrained.state_dict()
    assert loaded.keys() == fresh.keys()
    assert not pretrained.training
    for name, value in loaded.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, fresh[name]), name


def test_the_file_is_small() -> None:
    assert WEIGHTS.stat().st_size < 900_000


def test_accuracy_of_the_weights(pretrained: nn.Module) -> None:
    images, labels = load_digits("test")
    with torch.no_grad():
        right = (pretrained(images).argmax(1) == labels).double().mean().item()
    assert right >= 0.985  # 98.66% measured, 588 of 596
