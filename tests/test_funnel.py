"""Funnel, whose scores are skewed by reshapes and slices: tokens leave, and come back before they are pooled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

import rs_compile

transformers = pytest.importorskip("transformers")
WORDS, LEFT = 12, {0: 9, 1: 5}
LENGTHS = torch.tensor([12, 8, 10])


def encoder() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [3, 1]}
    model: nn.Module = transformers.FunnelBaseModel(transformers.FunnelConfig(**sizes)).eval().double()
    oracle.shake(model, 0.1)
    return model


class ByHand:
    """Layers that keep every token in place: those that are gone are no keys, and keep the value they left with."""

    def __init__(self) -> None:
        self.alive = torch.ones(3, WORDS, dtype=torch.float64)
        self.last = torch.zeros(3, WORDS, 32, dtype=torch.float64)

    def layer(self, i: int, layer: Any) -> Callable[..., tuple[Tensor]]:
        def run(query: Tensor, key: Tensor, value: Tensor, inputs: Any, **_: Any) -> tuple[Tensor]:
            positions, types, mask, first = inputs
            y = layer.attention(query, key, value, (positions, types, mask * self.alive, first))[0]
            branch = layer.ffn.linear_2(layer.ffn.activation_function(layer.ffn.linear_1(y)))
            self.last = torch.where(self.alive[..., None] > 0, y + branch, self.last)
            if i in LEFT:
                score = (branch - y).norm(dim=-1).masked_fill(mask == 0, -1.0)  # padding goes first
                score[self.alive == 0] = -2.0
                best = score.sort(descending=True, stable=True).indices[:, : LEFT[i]]
                self.alive = torch.zeros_like(self.alive).scatter_(1, best, 1.0)
            return (layer.ffn.layer_norm(self.last),)

        return run


@torch.no_grad()
def test_tokens_leave_before_they_are_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    ids = torch.randint(3, 50, (3, WORDS), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": (torch.arange(WORDS) < LENGTHS[:, None]).long()}
    handle = rs_compile.optimize(model, {0: 0.75, 1: 0.55}, backend="eager")
    found, dense = (m(**given).last_hidden_state for m in (handle, model))
    kept = rs_compile.optimize(model, {0: 1.0}, backend="eager")(**given).last_hidden_state
    torch.testing.assert_close(kept, dense, rtol=0, atol=0)
    assert [row.tokens_out for row in handle.report().blocks][:3] == [9, 5, WORDS]
    hand = ByHand()
    for i, layer in enumerate(model.encoder.blocks[0]):
        monkeypatch.setattr(layer, "forward", hand.layer(i, layer))
    wanted = model(**given).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # its softmax is taken in float32
    assert (dense - wanted).abs().max() > 0.01
