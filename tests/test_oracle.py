"""The oracle itself: its selection rule, and that without pruning it is the model."""

from __future__ import annotations

import hypothesis
import oracle
import pytest
import torch
from generated import Config, GeneratedViT
from hypothesis import strategies as st
from oracle import Pruning, Stream
from strategies import configs
from zoo import ZOO


def test_prune_keeps_protected_order_and_earlier_ties() -> None:
    x = torch.arange(6.0).reshape(1, 6, 1)
    score = torch.tensor([[0.0, 2.0, 1.0, 1.0, 3.0, 1.0]])
    kept, index = oracle.prune(x, score, keep_count=4, protected=1)
    assert index.tolist() == [[0, 1, 2, 4]], f"kept {index.tolist()}"
    assert kept.flatten().tolist() == [0.0, 1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("tokens", "keep", "left"), [(10, 0.8, 8), (197, 0.8, 158), (158, 0.8, 127), (127, 0.8, 102), (5, 0.9, 5)]
)
def test_keep_count_is_exact(tokens: int, keep: float, left: int) -> None:
    assert oracle.keep_count(tokens, keep) == left


def test_restored_tokens_have_the_value_they_left_with() -> None:
    stream = Stream(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]))
    stream.prune(torch.tensor([[9.0, 1.0, 8.0, 7.0]]), 0.75, protected=1)  # token 1 goes
    stream.tokens = stream.tokens * 10
    stream.prune(torch.tensor([[9.0, 1.0, 2.0]]), 0.6, protected=1)  # token 2 goes
    stream.tokens = stream.tokens * 10
    assert stream.restored().flatten().tolist() == [100.0, 2.0, 30.0, 400.0]


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_without_pruning_the_oracle_is_the_model(name: str) -> None:
    entry = ZOO[name]
    model, images = entry.model(), entry.images(2)
    oracle.assert_close(entry.forward(model, images, Pruning({})).outputs, model(images), 1e-5, name)


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_outputs_depend_on_which_tokens_are_kept(name: str) -> None:
    """Otherwise the comparisons with the compiler could not fail."""
    entry = ZOO[name]
    model, images = entry.model(), entry.images(2)
    dense = oracle.named_outputs(model(images))
    highest, lowest = (
        entry.forward(model, images, Pruning({0: 0.7}, protected=entry.prefix, lowest=low)).outputs
        for low in (False, True)
    )
    for field in highest:
        apart = oracle.max_difference(highest[field], dense[field])
        assert apart > 0.1, f"{name} {field}: pruned differs from dense by only {apart:.1e}"
        apart = oracle.max_difference(highest[field], lowest[field])
        assert apart > 0.1, f"{name} {field}: the lowest scores give the same within {apart:.1e}"


@hypothesis.given(config=configs(), batch=st.integers(1, 3))
@hypothesis.settings(max_examples=100)
@torch.no_grad()
def test_without_pruning_the_generated_oracle_is_the_model(config: Config, batch: int) -> None:
    model = GeneratedViT(config)
    images = model.images(batch)
    oracle.assert_close(model.forward_pruned(images, Pruning({})).outputs, model(images), 5e-5, str(config))
