"""transformers' Mamba models scan in code that no rule vouches for on fewer tokens: they are refused, with the line."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import Mamba2Config, Mamba2Model, MambaConfig, MambaModel

from rs_compile import Refusal, explain, optimize

SHAPE: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "expand": 2}


def refusal(model: Any) -> str:
    with pytest.raises(Refusal) as error:
        optimize(model.eval(), {0: 0.5}, backend="eager")(torch.randint(0, 20, (2, 6)))
    return str(error.value)


def test_mamba() -> None:
    model = MambaModel(MambaConfig(**SHAPE, time_step_rank=2, use_cache=False))
    text = refusal(model)
    assert text.startswith("aten.conv1d.default (conv1d): the model has no residual MLP branch")
    assert (
        "nearest to one comes this mixer branch (aten.conv1d.default: a convolution over the sequence of tokens" in text
    )
    assert re.search(r"modeling_mamba\.py\", line \d+, in forward: .*conv1d", text)
    assert "an op of your own gets a rule by rs_compile.register_token_rule" in text
    (note,) = explain(model, torch.randint(0, 20, (2, 6))).notes
    assert "a convolution over the sequence of tokens" in note


def test_mamba2() -> None:
    text = refusal(
        Mamba2Model(Mamba2Config(**SHAPE, head_dim=8, num_heads=4, n_groups=1, chunk_size=4, use_cache=False))
    )
    assert "nearest to one comes this mixer branch (" in text
    assert re.search(r"modeling_mamba2\.py\", line \d+, in forward: ", text)
