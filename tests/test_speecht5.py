"""SpeechT5's encoder, in which each query meets a matrix of its own: relative positions [N, N, d], without samples."""

from __future__ import annotations

import pytest
import torch

import rs_compile

pytest.importorskip("transformers")
LEFT = {0: 18, 1: 9, 2: 6}


@torch.no_grad()
def test_tokens_leave_with_their_matrices() -> None:
    from transformers import SpeechT5Config
    from transformers.models.speecht5.modeling_speecht5 import SpeechT5EncoderWithoutPrenet

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    model = SpeechT5EncoderWithoutPrenet(SpeechT5Config(**sizes, encoder_max_relative_position=20)).eval().double()
    frames = torch.randn(2, 24, 32).double()
    shares = {0: 0.75, 1: 0.5, 2: 2 / 3}
    found = rs_compile.optimize(model, shares, backend="eager", token_outputs="compact")(frames)[0]
    encoder = model.wrapped_encoder
    for b in range(2):
        x, at = encoder.layer_norm(frames[b]), torch.arange(24)
        bias = encoder.embed_positions(frames)
        for i, layer in enumerate(encoder.layers):
            y = layer.attention(x[None], position_bias=bias[at][:, at])[0][0]
            y = layer.layer_norm(x + y)
            branch = layer.feed_forward(y)
            x = layer.final_layer_norm(y + branch)
            if i in LEFT:
                kept = (branch - y).norm(dim=-1).topk(LEFT[i]).indices.sort().values
                x, at = x[kept], at[kept]
        assert found.kept[b].tolist() == at.tolist()
        torch.testing.assert_close(found.tokens[b], x, rtol=0, atol=1e-12)
