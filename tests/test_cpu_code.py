"""What runs on a CPU, by Inductor's own C++: the score adds no pass over memory, and bfloat16 stays bfloat16."""

from __future__ import annotations

import pytest
import timm
import torch
from cpp_kernels import Access, Nest, moved, nests
from torch import nn
from torch._inductor.utils import run_and_get_code

import rs_compile

BATCH, TOKENS, WIDTH, KEPT = 2, 37, 64, 35
FULL, SHORT = BATCH * TOKENS * WIDTH, BATCH * KEPT * WIDTH


def model(dtype: torch.dtype, depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 96, "depth": depth, "embed_dim": WIDTH, "num_heads": 2, "num_classes": 5}
    return timm.create_model("deit_tiny_patch16_224", **options).eval().to(dtype)


@torch.no_grad()
def compiled(dtype: torch.dtype, pruned: bool) -> list[Nest]:
    """The loop nests of the two-block model, with tokens leaving after the first block or not."""
    dense = model(dtype)
    run = rs_compile.optimize(dense, {0: 0.92}) if pruned else torch.compile(dense)
    _, code = run_and_get_code(run, torch.randn(BATCH, 3, 96, 96).to(dtype))
    found = nests("\n".join(code))
    if pruned:
        assert run.report().blocks[0].tokens_out == KEPT
    return found


def site(found: list[Nest]) -> list[Nest]:
    """What runs between the first block's MLP and the second's attention."""
    names = list(dict.fromkeys(nest.kernel for nest in found))
    after = names[next(i for i, name in enumerate(names) if "gelu" in name) + 1 :]
    norm = next(i for i, name in enumerate(after) if "layer_norm" in name)
    return [nest for nest in found if nest.kernel in after[: norm + 1]]


def scoring(found: list[Nest]) -> Nest:
    """The nest that sums squares over channels."""
    names = {nest.kernel for nest in found if "linalg_vector_norm" in nest.kernel}
    nest, *others = [n for n in found if n.kernel in names and "tmp_acc0_vec" in n.text]
    assert not others, "the score is summed more than once"
    return nest


def stores(accesses: list[Access]) -> list[Access]:
    return [a for a in accesses if a.stored]


@pytest.mark.inductor
def test_the_score_is_no_pass_of_its_own() -> None:
    """Of the unpruned graph's two passes over all tokens for the next norm, one is left, and it is the score's.

    It reads what is summed to the residual stream, no more than the norm would have, writes nothing of its size, and
    whatever comes behind it (gather, norm) runs over the kept tokens.
    """
    dense, pruned = site(compiled(torch.float32, False)), site(compiled(torch.float32, True))
    score = scoring(pruned)
    terms = score.large(FULL)
    assert not stores(terms), "a [B, N, C] value is written for the score"
    assert len(stores(list(score.accesses))) == 1, "the score is one number a token"
    passes = [[nest for nest in side if nest.large(FULL)] for side in (dense, pruned)]
    assert passes[1] == [score] and len(passes[0]) >= 2, "something else goes through all tokens"
    reads = [a for a in passes[0][0].large(FULL) if not a.stored]
    assert 2 <= len(terms) <= len(reads), f"the score reads {len(terms)} values, the dense norm {len(reads)}"


@pytest.mark.inductor
def test_bfloat16_stays_bfloat16() -> None:
    """No value of [B, tokens, C] is read or written in float32; the score's sum alone is kept in it."""
    pruned = compiled(torch.bfloat16, True)
    wide = {(nest.kernel, a.pointer) for nest in pruned for a in nest.large(SHORT) if a.dtype == "float"}
    assert not wide, f"float32 in memory: {wide}"
    score = scoring(pruned)
    assert {a.dtype for a in score.large(FULL)} == {"at::BFloat16"}
    assert "float tmp_acc0 = 0" in score.text


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@torch.no_grad()
def test_with_its_scores_a_pruned_transformer_moves_no_more(dtype: torch.dtype) -> None:
    """Four blocks, three sites, all loops outside the matrix products.

    No loop stores the residual sum of all tokens, which the score could share: only that of the kept tokens is stored,
    once they are known. So the score reads the terms once, and what the norm behind reads less pays for it.
    """
    dense = model(dtype, depth=4)
    images = torch.randn(BATCH, 3, 96, 96).to(dtype)
    keep = dict.fromkeys(range(3), 0.92)
    _, whole = run_and_get_code(torch.compile(dense), images)
    _, short = run_and_get_code(rs_compile.optimize(dense, keep), images)
    assert moved("\n".join(short)) <= moved("\n".join(whole))
