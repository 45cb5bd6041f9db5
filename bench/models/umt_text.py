"""UMT's text side (Li et al., ICCV 2023): BERT whose last layers also read a video, named as in its checkpoints.

The layers are transformers' own. What is here is the order in which UMT runs them: the first layers on the text alone,
the last ones, the fusion layers, with cross-attention to a video's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer, BertOnlyMLMHead

HIDDEN = -10000.0  # added to the attention scores of a position that is not read, as published


@dataclass(frozen=True)
class TextSize:
    """Of a BERT encoder.

    Args:
        dim, depth, heads: width, layers, attention heads; the MLP is four times as wide.
        fusion: the first layer with cross-attention.
        vocabulary, positions: rows of the two tables.
    """

    dim: int
    depth: int
    heads: int
    fusion: int
    vocabulary: int = 30522
    positions: int = 512

    def config(self, cross: bool) -> Any:
        """Of transformers' layers, with or without cross-attention."""
        make: Any = BertConfig  # its own types know none of the options of all models
        return make(
            vocab_size=self.vocabulary,
            hidden_size=self.dim,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.dim,
            max_position_embeddings=self.positions,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            is_decoder=cross,  # transformers' condition for cross-attention; causal only where the mask is
            add_cross_attention=cross,
            attn_implementation="sdpa",
        )


class Layers(nn.Module):
    """A stack of BERT layers, of which those from `fusion` on have cross-attention to states of `width` channels."""

    def __init__(self, size: TextSize, fusion: int, depth: int, width: int) -> None:
        super().__init__()
        layers: list[Any] = [BertLayer(size.config(cross=i >= fusion), layer_idx=i) for i in range(depth)]
        for layer in layers[fusion:]:
            attention = layer.crossattention.self
            attention.key, attention.value = nn.Linear(width, size.dim), nn.Linear(width, size.dim)
        self.layer = nn.ModuleList(layers)


class TextEncoder(nn.Module):
    """Token ids -> states of each token, alone or together with a video.

    Args:
        size: of the text model.
        width: channels of the video's tokens.
    """

    def __init__(self, size: TextSize, width: int) -> None:
        super().__init__()
        self.fusion = size.fusion
        self.embeddings = BertEmbeddings(size.config(cross=False))
        self.encoder = Layers(size, size.fusion, size.depth, width)

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The layers before the fusion.

        Args:
            ids: [B, L], filled up to one length.
            mask: bool [B, L], False where filled up.

        Returns:
            [B, L, C].
        """
        x = self.embeddings(ids)
        hidden = additive(mask, x)
        for layer in self.encoder.layer[: self.fusion]:
            x = run(layer, x, hidden)
        return x

    def fuse(self, text: Tensor, mask: Tensor, video: Tensor) -> Tensor:
        """The fusion layers.

        Args:
            text: [B, L, C] of `text`; B is a multiple of S.
            mask: bool [B, L] of the text. Of a video every token is read.
            video: [S, K, W], however many tokens were left; each is read by B / S consecutive texts.

        Returns:
            [B, L, C].
        """
        hidden = additive(mask, text)
        for layer in self.encoder.layer[self.fusion :]:
            text = run(layer, text, hidden, video)
        return text


class AnswerDecoder(nn.Module):
    """BERT as a language model, every layer with cross-attention to the states of a question.

    Args:
        size: of the question's encoder; the decoder has as many layers as that has fusion layers.
    """

    def __init__(self, size: TextSize) -> None:
        super().__init__()
        config = size.config(cross=True)
        self.bert: Any = nn.Module()
        self.bert.embeddings = BertEmbeddings(config)
        self.bert.encoder = Layers(size, 0, size.depth - size.fusion, size.dim)
        self.cls = BertOnlyMLMHead(config)
        # tied, as published
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
        self.cls.predictions.decoder.bias = self.cls.predictions.bias

    def forward(self, ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor) -> Tensor:
        """Logits of the token that follows each position.

        Args:
            ids: [B, L]; B is a multiple of Q.
            mask: bool [B, L], False where filled up.
            states: [Q, M, C] of the questions; each is read by B / Q consecutive rows.
            states_mask: bool [Q, M].

        Returns:
            [B, L, vocabulary].
        """
        x = self.bert.embeddings(ids)
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        hidden = additive(mask.unsqueeze(1) & causal, x)
        for layer in self.bert.encoder.layer:
            x = run(layer, x, hidden, states, additive(states_mask, x))
        logits: Tensor = self.cls(x)
        return logits


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask [B, K] or [B, L, K], True where read, as what is added to scores [B, heads, L, K]."""
    rows = mask.unsqueeze(1) if mask.dim() == 2 else mask
    return torch.zeros_like(rows, dtype=like.dtype).masked_fill_(~rows, HIDDEN).unsqueeze(1)


def run(layer: Any, x: Tensor, mask: Tensor, states: Tensor | None = None, states_mask: Tensor | None = None) -> Tensor:
    """One layer [B, L, C] -> [B, L, C]: self-attention, cross-attention to states [S, K, W] if given, MLP.

    The B / S rows that read the same states are one row of queries in the cross-attention, where queries do not meet:
    keys and values of a video are computed once, not once a text.
    """
    x = layer.attention(x, mask)[0]
    if states is not None:
        queries = x.reshape(len(states), -1, x.shape[-1])
        read = layer.crossattention(queries, encoder_hidden_states=states, encoder_attention_mask=states_mask)[0]
        x = read.view_as(x)
    out: Tensor = layer.feed_forward_chunk(x)
    return out
