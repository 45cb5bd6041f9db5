"""ViTDet, whose windows need every token: tokens leave before a global layer and come back behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rs_compile

pytestmark = pytest.mark.usefixtures("captured_once")

transformers = pytest.importorskip("transformers")
KEEP = {0: 0.6, 3: 0.5}  # layers 1 and 4 have no windows


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "window_size": 4}
    images = {"image_size": 64, "pretrain_image_size": 64, "patch_size": 8}
    config = transformers.VitDetConfig(**sizes, **images, window_block_indices=[0, 2, 3, 5])
    made: nn.Module = transformers.VitDetModel(config).eval().double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@torch.no_grad()
def by_hand(model: Any, images: Tensor) -> Tensor:
    """[B, C, H, W]: the layer behind a site runs on a map of one row, whose columns are the tokens left."""
    x = model.embeddings(images)
    short: Tensor | None = None
    for i, layer in enumerate(model.encoder.layer):
        if short is not None:
            flat = x.flatten(2)
            ran = layer(flat.gather(2, short).unsqueeze(2))[0].flatten(2)
            x, short = flat.scatter(2, short, ran).reshape(x.shape), None
            continue
        seen: dict[str, Tensor] = {}
        hooks = [
            layer.norm2.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(stream=args[0])),
            layer.mlp.register_forward_hook(lambda _, __, out, seen=seen: seen.update(branch=out)),
        ]
        x = layer(x)[0]
        for hook in hooks:
            hook.remove()
        if i in KEEP:
            score = (seen["branch"] - seen["stream"]).norm(dim=-1).flatten(1)
            kept = score.shape[1] - int(round((1 - KEEP[i]) * score.shape[1], 9))
            order = score.topk(kept, dim=1).indices.sort(dim=1).values
            short = order.unsqueeze(1).expand(-1, x.shape[1], -1)
    return x


def test_tokens_leave_before_the_global_layers_only(model: nn.Module) -> None:
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    handle = rs_compile.optimize(model, KEEP, backend="eager")
    with torch.no_grad():
        pruned, dense = handle(images).last_hidden_state, model(images).last_hidden_state
    wanted = by_hand(model, images)
    torch.testing.assert_close(pruned, wanted, rtol=0, atol=1e-10)
    assert (dense - wanted).abs().max() > 0.01
    assert [row.tokens_out for row in handle.report().blocks] == [39, 64, 64, 32, 64, 64]
