"""Padding: what a mask of the model's inputs shows to no query leaves first, and never in place of a real token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from blocks import MLP
from graphs import B, N, sample
from torch import Tensor, nn

from passes.graph.base import Refusal
from passes.graph.splice import ORIGIN
from passes.network.branches import blocks_of, find_blocks, find_branches
from passes.network.padding import hidden_by_mask, hidden_by_weights, masking
from passes.network.prunable import Answer, prunable
from passes.pipeline import prepare, prune
from passes.sites.select import keep_highest
from passes.sites.steps import Merge, Prune

WORDS = torch.arange(N) < torch.tensor([[N], [2], [5]])  # [B, N]: sentences of 6, 2 and 5 tokens
Attend = Callable[[Tensor, Tensor], Tensor]


def additive(x: Tensor, words: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, (1.0 - words[:, None].float()) * -10000.0)


def boolean(x: Tensor, words: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, words[:, None].expand(-1, N, -1))


def causal(x: Tensor, words: Tensor) -> Tensor:
    earlier = torch.ones(N, N, dtype=torch.bool, device=x.device).tril()
    return F.scaled_dot_product_attention(x, x, x, words[:, None] & earlier)


def sized_by_tokens(x: Tensor, words: Tensor) -> Tensor:
    """The mask takes its size from the tokens, and nothing else; a query that is padding sees everything."""
    mask = words[:, None].expand(x.shape[0], x.shape[1], -1) & words[:, :, None]
    logits = (x @ x.mT).masked_fill(~mask, torch.finfo(x.dtype).min)
    return (logits.softmax(-1) * 0.5) @ x


def by_hand(x: Tensor, words: Tensor) -> Tensor:
    """Not lowered: weights are halved."""
    return ((x @ x.mT).masked_fill(~words[:, None], -torch.inf).softmax(-1) * 0.5) @ x


class Encoder(nn.Module):
    """Layers of attention and MLP over x [B, N, C], with a mask [B, N] of real tokens."""

    def __init__(self, attend: Attend, depth: int = 2) -> None:
        super().__init__()
        self.attend = attend
        self.layers = nn.ModuleList(MLP() for _ in range(depth))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        for mlp in self.layers:
            x = x + self.attend(F.layer_norm(x, x.shape[-1:]), words)
            x = x + mlp(x)
        return x


def kept(attend: Attend, count: int, words: Tensor = WORDS) -> Tensor:
    """The positions [B, K] left after the first layer."""
    torch.manual_seed(0)
    gm = prepare(Encoder(attend).eval(), (sample(), words), {}, lower=True).gm
    compiled = prune(gm, [Prune(0, lambda n: count)], compact_outputs=True)
    with torch.no_grad():
        index: Tensor = compiled.gm(sample(), words)[-1]
    return index


@pytest.mark.parametrize("attend", [additive, boolean, causal, by_hand, sized_by_tokens])
def test_real_tokens_outlive_padding(attend: Attend):
    index = kept(attend, 3)
    real = WORDS.gather(1, index).sum(1)
    assert real.tolist() == [3, 2, 3]  # the second sentence has but two


@pytest.mark.parametrize("attend", [additive, boolean, causal])
def test_a_sentence_keeps_the_same_words_whatever_its_neighbours_are(attend: Attend):
    others_full = torch.ones_like(WORDS)
    assert torch.equal(kept(attend, 3)[0], kept(attend, 3, others_full)[0])


@pytest.mark.parametrize("attend", [additive, boolean, causal, by_hand])
def test_padding_must_not_merge_into_a_real_token(attend: Attend):
    gm = prepare(Encoder(attend).eval(), (sample(), WORDS), {}, lower=True).gm
    with pytest.raises(Refusal, match="padding must not merge") as refusal:
        prune(gm, [Merge(0, lambda n: 2)])
    assert refusal.value.way_out.startswith("prune")


def test_hidden_by_a_mask():
    lowest = torch.finfo(torch.float32).min
    mask = torch.tensor([[0.0, -5.0, lowest], [lowest, 0.0, lowest]])  # [Nq, Nk]: the last is seen by no query
    assert hidden_by_mask(mask.expand(B, 1, 2, 3), B).tolist() == [[False, False, True]] * B
    assert hidden_by_mask(mask > -1, 1).tolist() == [[False, False, True]]
    assert hidden_by_mask(mask[None], B).tolist() == [[False, False, True]]  # one for all samples
    # the last word of a causal model is seen by itself alone, and is what the model reads
    assert not hidden_by_mask(torch.ones(1, 3, 3, dtype=torch.bool).tril(), 1).any()


def test_hidden_by_weights():
    weights = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).expand(B, 2, 2, 3)
    assert hidden_by_weights(weights, B).tolist() == [[False, False, True]] * B


def test_padding_loses_to_any_score_and_yields_to_protection():
    score = torch.tensor([[-torch.inf, 5.0, torch.nan, 7.0]])
    padding = torch.tensor([[False, True, True, True]])
    none, last = torch.zeros(4, dtype=torch.bool), torch.arange(4) == 3
    assert keep_highest(score, none, 1, padding=padding).tolist() == [[0]]
    assert keep_highest(score, none, 2, lowest=True, padding=padding).tolist() == [[0, 1]]
    assert keep_highest(score, last, 2, padding=padding).tolist() == [[0, 3]]


def test_a_constant_mask_is_not_taken_for_padding_behind_the_first_site():
    """There it is gathered by positions, which the inputs decide; nothing is to be looked for in it."""
    torch.manual_seed(0)
    bias = torch.randn(N, N)

    def biased(x: Tensor, words: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, bias)

    def padding(attend: Attend) -> int:
        gm = prepare(Encoder(attend, 3).eval(), (sample(), WORDS), {}, lower=True).gm
        compiled = prune(gm, [Prune(0, lambda n: 5), Prune(1, lambda n: 4)])
        return sum(ORIGIN.get(node) == "padding" for node in compiled.gm.graph.nodes)

    assert padding(biased) == 0 < padding(additive)


def test_attention_that_reads_no_mask_hides_nobody() -> None:
    """Whatever is on its way: here no rule carries the tokens through."""

    def turned(x: Tensor, words: Tensor) -> Tensor:
        return ((x @ x.mT).softmax(-1).flip(-1) * 0.5) @ x

    gm = prepare(Encoder(turned, depth=1).eval(), (sample(), WORDS), {}, lower=True).gm
    block = find_blocks(gm)[0]
    assert block.attention is not None and masking(gm, block, 0, 0) is None


class Convolves(nn.Module):
    """Its keys come from a convolution over the tokens, which no shorter sequence can go through."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked, self.conv, self.mlp = masked, nn.Conv1d(8, 8, 3, padding=1), MLP()

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        keys = self.conv(x.mT).mT
        mask = words[:, None].expand(-1, N, -1) if self.masked else None
        x = x + F.scaled_dot_product_attention(x, keys, x, mask)
        return x + self.mlp(x)


def test_keys_that_cannot_be_followed_may_hide_padding():
    """The matcher's answer and the rewrite's are one."""
    gm = prepare(Convolves(True).eval(), (sample(), WORDS), {}, lower=True).gm
    branches = find_branches(gm)
    (block,) = blocks_of(branches)
    words = "a convolution over the sequence of tokens, so which tokens the attention behind it hides as padding cannot"
    answer = prunable(gm, block, branches)
    assert not answer.able and answer.reason.startswith("aten.conv1d.default (conv1d): " + words)
    assert "test_padding.py" in answer.reason
    with pytest.raises(Refusal, match=words) as refusal:
        prune(gm, [Prune(0, lambda n: 4)])
    assert refusal.value.way_out.startswith("call the model without its mask")
    assert prune(gm, [Prune(0, lambda n: n)]).blocks[0].tokens_out == N  # where nothing leaves, nothing need be told


def test_without_a_mask_what_the_attention_does_with_keys_is_its_own():
    gm = prepare(Convolves(False).eval(), (sample(), WORDS), {}, lower=True).gm
    branches = find_branches(gm)
    assert prunable(gm, blocks_of(branches)[0], branches) == Answer(True)
    assert prune(gm, [Prune(0, lambda n: 4)]).blocks[0].tokens_out == 4
