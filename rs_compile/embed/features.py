"""Which features of a model: what stands for a picture."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rs_compile.arguments import FEATURES
from rs_compile.embed.errors import EmbedError


class Features(nn.Module):
    """A timm model up to its features, as one module, so that what they do not read is not computed.

    Args:
        model: timm's, for "output" any.
        kind: "class" [B, C] the class token; "pooled" [B, C] as the model pools for its classifier; "tokens" [B, N, C]
            every token, those that left with the value they left with (CNNs: [B, C, H, W] maps); "output" whatever
            tensor the model returns.

    Raises:
        EmbedError: the model has no such features.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        name = type(model).__name__
        if kind not in FEATURES:
            raise EmbedError(f"features is {kind!r}; write one of {', '.join(FEATURES)}")
        if kind != "output" and not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
            raise EmbedError(
                f"{name} has no forward_features and forward_head, as timm's models have; ask for its output "
                '(features="output")'
            )
        if kind == "class" and getattr(model, "cls_token", None) is None:
            raise EmbedError(f"{name} has no class token; ask for pooled features (--features pooled)")
        self.model, self.kind = model, kind
        self.train(model.training)

    def forward(self, pictures: Tensor) -> Any:
        """Features of pictures [B, C, H, W]."""
        model: Any = self.model
        if self.kind == "output":
            return model(pictures)
        features = model.forward_features(pictures)
        if self.kind == "class":
            return features[:, 0]
        return model.forward_head(features, pre_logits=True) if self.kind == "pooled" else features
