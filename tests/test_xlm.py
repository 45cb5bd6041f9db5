"""XLM and Flaubert: masks expanded to the scores, and each layer times the mask. No module of theirs is a layer."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor, nn

import rs_compile

transformers = pytest.importorskip("transformers")
WORDS = 12
LEFT = {0: 9, 2: 5}
LENGTHS = (12, 7, 10)  # of the sentences: the second keeps two padded tokens at first


def encoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "emb_dim": 32, "n_layers": 4, "n_heads": 4, "max_position_embeddings": 16}
    config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model: nn.Module = getattr(transformers, f"{kind}Model")(config).eval().double()
    oracle.shake(model, 0.1)
    return model


def sentences() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 50, (3, WORDS), generator=torch.Generator().manual_seed(0))
    return ids, (torch.arange(WORDS) < torch.tensor(LENGTHS)[:, None]).long()


def by_hand(model: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[list[int]]]:
    """[1, N, C] for one sentence, and which tokens are left behind each pruned layer."""
    x = model.embeddings(ids) + model.position_embeddings(torch.arange(WORDS))
    x, at = model.layer_norm_emb(x) * mask[:, None], torch.arange(WORDS)
    whole, left = torch.zeros_like(x), []
    for i in range(4):
        y = model.layer_norm1[i](x + model.attentions[i](x[None], mask[None, at])[0][0])
        branch = model.ffns[i](y[None])[0]
        whole[at] = y + branch
        if i in LEFT:
            score = (branch - y).norm(dim=-1).masked_fill(mask[at] == 0, -1.0)  # padding goes first
            best = score.sort(descending=True, stable=True).indices[: LEFT[i]]
            at = at[best.sort().values]
            left.append(at.tolist())
        x = model.layer_norm2[i](whole[at]) * mask[at, None]
    return model.layer_norm2[3](whole) * mask[:, None], left


@pytest.mark.parametrize("kind", ["XLM", "Flaubert"])
@torch.no_grad()
def test_tokens_leave(kind: str) -> None:
    model, (ids, mask) = encoder(kind), sentences()
    handle = rs_compile.optimize(model, {0: 0.75, 2: 0.55}, backend="eager")
    found, dense = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (handle, model))
    for b in range(3):
        wanted, left = by_hand(model, ids[b], mask[b])
        torch.testing.assert_close(found[b], wanted, rtol=0, atol=1e-5)  # their softmax is taken in float32
        assert sum(mask[b, at] for at in left[0]) == min(LENGTHS[b], LEFT[0])
    assert (found - dense).abs().max() > 0.01
    assert [row.tokens_out for row in handle.report().blocks] == [9, 9, 5, 5]
    more = handle(input_ids=ids.repeat(2, 1), attention_mask=mask.repeat(2, 1)).last_hidden_state
    torch.testing.assert_close(more, found.repeat(2, 1, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["XLM", "Flaubert"])
@torch.no_grad()
def test_that_keeps_all_gives_the_models_result(kind: str) -> None:
    model, (ids, mask) = encoder(kind), sentences()
    handle = rs_compile.optimize(model, {1: 1.0}, backend="eager")
    outs = [m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (handle, model)]
    torch.testing.assert_close(*outs, rtol=0, atol=0)
