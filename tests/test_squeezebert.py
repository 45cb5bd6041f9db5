"""SqueezeBERT: streams [B, C, N], whose linear layers are grouped convolutions of one entry."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor, nn

import rs_compile

transformers = pytest.importorskip("transformers")
WORDS, LEFT = 12, {0: 9, 2: 5}
LENGTHS = (12, 8, 10)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "embedding_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.SqueezeBertConfig(vocab_size=50, intermediate_size=64, max_position_embeddings=16, **sizes)
    model: nn.Module = transformers.SqueezeBertModel(config).eval().double()
    oracle.shake(model, 0.1)
    return model


def sentences() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 50, (3, WORDS), generator=torch.Generator().manual_seed(0))
    return ids, (torch.arange(WORDS) < torch.tensor(LENGTHS)[:, None]).long()


def by_hand(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """[N, C] for one sentence, of ids [N]."""
    x, at = model.embeddings(ids[None])[0].T, torch.arange(WORDS)  # [C, N]
    for i, layer in enumerate(model.encoder.layers):
        hidden = (1.0 - mask[at].double()) * -1e30
        mixed = layer.attention(x[None], hidden, False)["context_layer"]
        y = layer.post_attention(mixed, x[None])[0]
        branch = layer.output.conv1d(layer.intermediate(y[None]))[0]
        if i == 0:
            whole = torch.zeros_like(y)
        whole[:, at] = y + branch
        if i in LEFT:
            score = (branch - y).norm(dim=0).masked_fill(mask[at] == 0, -1.0)  # padding goes first
            score[0] = torch.inf  # the pooler reads it
            at = at[score.sort(descending=True, stable=True).indices[: LEFT[i]].sort().values]
        x = layer.output.layernorm(whole[None, :, at])[0]
    out: Tensor = layer.output.layernorm(whole[None])[0].T
    return out


@torch.no_grad()
def test_tokens_leave() -> None:
    model, (ids, mask) = encoder(), sentences()
    handle = rs_compile.optimize(model, {0: 0.75, 2: 0.55}, backend="eager")
    found, dense = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (handle, model))
    for b in range(3):
        torch.testing.assert_close(found[b], by_hand(model, ids[b], mask[b]), rtol=0, atol=1e-9)
    assert (found - dense).abs().max() > 0.01
    assert [row.tokens_out for row in handle.report().blocks] == [9, 9, 5, 5]


@torch.no_grad()
def test_that_keeps_all_gives_the_models_result() -> None:
    model, (ids, mask) = encoder(), sentences()
    handle = rs_compile.optimize(model, {1: 1.0}, backend="eager")
    outs = [m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (handle, model)]
    torch.testing.assert_close(*outs, rtol=0, atol=0)
