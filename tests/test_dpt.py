"""DPT for depth: layers between its taps, and a class token read out beside every other token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

import rs_compile

transformers = pytest.importorskip("transformers")
TAPS = [1, 2, 4, 5]
LEFT = {0: 26, 3: 14}  # of 1 + 6 x 6 tokens


def depth_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64}
    image = {"image_size": 48, "patch_size": 8, "backbone_out_indices": TAPS}
    head = {"neck_hidden_sizes": [8, 12, 16, 20], "fusion_hidden_size": 16}
    config = transformers.DPTConfig(**sizes, **image, **head, is_hybrid=False)
    model = transformers.DPTForDepthEstimation(config).eval().double()
    oracle.shake(model, 0.1)
    model.head.head[-2].bias.data.fill_(3.0)  # the depth ends in a ReLU, and is to be none of its zeros
    made: nn.Module = model
    return made


class ByHand:
    """The layers, run sample by sample on the tokens that are left; each of the others keeps its last value."""

    def __init__(self) -> None:
        self.left: list[Tensor] = []

    def layer(self, i: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *_: Any, **__: Any) -> Tensor:
            if i == 0:
                self.left = [torch.arange(x.shape[1])] * len(x)
            out = x.clone()
            for b, at in enumerate(self.left):
                y = out[b, at] = forward(x[b : b + 1, at])[0]
                if i in LEFT:
                    score = (y - x[b, at]).norm(dim=-1)
                    score[0] = torch.inf  # the class token
                    self.left[b] = at[score.topk(LEFT[i]).indices.sort().values]
            return out

        return run


@torch.no_grad()
def test_tokens_leave_between_the_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = depth_model()
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    schedule = rs_compile.Schedule(keep={0: 26 / 37, 3: 14 / 26}, score=rs_compile.Shift(of="block"))
    handle = rs_compile.optimize(model, schedule, backend="eager")
    found, dense = (m(images).predicted_depth for m in (handle, model))
    assert [row.tokens_out for row in handle.report().blocks] == [26, 26, 26, 14, 14, 14]
    assert all(row.prunable for row in rs_compile.explain(model, images).rows)
    hand = ByHand()
    for i, layer in enumerate(model.dpt.encoder.layer):
        monkeypatch.setattr(layer, "forward", hand.layer(i, layer.forward))
    wanted = model(images).predicted_depth
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert (dense - wanted).abs().max() > 1e-3 and (wanted > 0).all()
