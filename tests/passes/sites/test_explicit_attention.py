"""Attention written out behind a merge, in half precision: size bias is a float32 mask on CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from generated import Config, GeneratedViT
from graphs import graph_of

from passes.graph.base import Refusal
from passes.graph.codes import Code
from passes.sites.explicit_attention import ExplicitAttention
from rs_compile import OptimizedModel, Schedule
from rs_compile.compiling import Options


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_written_out_behind_a_merge_in_half_precision(dtype: torch.dtype) -> None:
    model = GeneratedViT(Config(depth=2)).to(dtype)
    images, schedule = model.images(2).to(dtype), Schedule(merge={0: 3})
    written, fused = (
        OptimizedModel(model, Options(schedule, backend="eager", explicit_attention=explicit))(images)
        for explicit in (True, False)
    )
    assert written.dtype == dtype
    torch.testing.assert_close(written, fused, atol=2e-2, rtol=2e-2)


def test_attention_with_dropout_has_no_one_map() -> None:
    gm = graph_of(lambda x: F.scaled_dot_product_attention(*[x[:, None]] * 3, dropout_p=0.5)[:, 0])
    with pytest.raises(Refusal, match="attention with dropout has no one map to read") as refusal:
        ExplicitAttention().apply(gm)
    assert refusal.value.code == Code.TRAIN_MODE
