"""How many kernels an H100 would launch for a rewritten graph, counted in Inductor's code; no GPU is needed."""

from __future__ import annotations

import re
from functools import cache

import pytest
from cases import DEPTH, SITES, cnn, transformer
from fake_gpu import Generated, generate

from rs_compile import GridPrune, Schedule

pytestmark = pytest.mark.inductor

KEPT = Schedule(keep=dict.fromkeys(SITES, 0.95))  # of 577 tokens more than 512 reach the last site
MERGED = Schedule(merge=dict.fromkeys(SITES, 0.1))
FLASH = "torch.ops.aten._scaled_dot_product_flash_attention.default"
LINES, CELLS = (Schedule(grid=dict.fromkeys(SITES, GridPrune(rows=2, columns=2, mode=m))) for m in ("line", "token"))


@cache
def dense(tokens: int) -> Generated:
    return generate(transformer(tokens, Schedule()), batch=64)


@cache
def pruned(tokens: int) -> Generated:
    return generate(transformer(tokens, KEPT), batch=64)


def check_all_on_the_gpu(generated: Generated, attentions: int) -> None:
    """One flash launch an attention and no softmax, nothing on the host, no size that is not known."""
    launches, body = generated.launches, generated.body
    assert launches.count(FLASH) == attentions
    assert not [launch for launch in launches if "softmax" in launch or "scaled_dot_product_attention" in launch]
    assert not re.search(r"\.item\(|\.tolist\(|_local_scalar_dense|device_put|'cpu'|\"cpu\"|_cpu\(", body)
    assert not re.search(r"\b[su]\d+\b", body)
    assert generated.records_cuda_graph


def behind(launches: list[str], site: int) -> list[str]:
    """The launches from the end of a block to the first matrix product of the next one."""
    products = [i for i, launch in enumerate(launches) if launch == "extern_kernels.addmm"]
    first, last = products[4 * site + 3], products[4 * site + 4]
    return launches[first + 1 : last]


def test_the_dense_transformer_launches_nothing_to_spare() -> None:
    """The baseline: a block's end is one kernel, the residual add and the next norm."""
    launches = dense(197).launches
    assert [len(behind(launches, site)) for site in SITES] == [1, 1, 1]
    check_all_on_the_gpu(dense(197), DEPTH)


def test_two_more_launches_a_site() -> None:
    generated = pruned(197)
    assert len(generated.launches) - len(dense(197).launches) == 2 * len(SITES)
    check_all_on_the_gpu(generated, DEPTH)


def test_three_more_launches_a_site_above_512_tokens() -> None:
    generated = pruned(577)
    # block by block as at 197 tokens: the dense graph's launches do not depend on N
    assert len(generated.launches) - len(dense(197).launches) == 3 * len(SITES)
    check_all_on_the_gpu(generated, DEPTH)


@pytest.mark.slow
def test_the_dense_graph_launches_as_much_at_577_tokens() -> None:
    assert len(dense(577).launches) == len(dense(197).launches)


def test_score_select_gather_are_three_kernels() -> None:
    for site in SITES:
        score, select, gather = behind(pruned(197).launches, site)
        assert "add_linalg_vector_norm" in score  # the residual add is in it
        assert "where_" in select and select.count("sort") == 1  # the prefix, and both sorts
        assert "add_expand_gather_native_layer_norm" in gather


def test_above_512_tokens_the_score_takes_the_prefix_mask_too() -> None:
    for site in SITES:
        score, *select, gather = behind(pruned(577).launches, site)
        assert "add_" in score and "linalg_vector_norm" in score and "where" in score
        assert len(select) == 2 and select[0] == "torch.ops.aten.topk.default" and "sort" in select[1]
        assert "add_expand_gather_native_layer_norm" in gather


@pytest.mark.parametrize("tokens", [197, 577])
def test_tokens_are_gathered_once_a_site(tokens: int) -> None:
    assert sum("gather" in launch for launch in pruned(tokens).launches) == len(SITES)


@pytest.mark.slow
def test_inductors_own_threshold_would_gather_again() -> None:
    """Why `inductor_options` sets it."""
    plain = generate(transformer(197, KEPT), batch=64, realize_reads_threshold=4)
    assert len(plain.launches) == len(pruned(197).launches)
    assert sum("gather" in launch for launch in plain.launches) > len(SITES)


def test_merging_with_size_bias_stays_on_flash() -> None:
    """A merge: 4 kernels match, 3 say who is left and where, 3 merge sizes and values. Behind it an attention with size
    bias: 3 kernels write the padded heads, 1 takes the padding off."""
    generated = generate(transformer(197, MERGED), batch=64)
    check_all_on_the_gpu(generated, DEPTH)
    assert len(generated.launches) - len(dense(197).launches) <= len(SITES) * (10 + 4)


@pytest.mark.slow
def test_merging_above_512_tokens() -> None:
    """At the first site the sort of all tokens is then a call, with a kernel on either side of it."""
    generated = generate(transformer(577, MERGED), batch=64)
    check_all_on_the_gpu(generated, DEPTH)
    assert len(generated.launches) - len(dense(197).launches) <= len(SITES) * (10 + 4) + 2


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "more"), [(LINES, 5), (CELLS, 3)])
def test_rows_and_columns_of_a_cnn(schedule: Schedule, more: int) -> None:
    """The score joins the last add and ReLU of the stage. Lines: two means, two selections, one gather; cells: two
    selections and the gather."""
    whole, cut = (generate(cnn(s), batch=8) for s in (Schedule(), schedule))
    check_all_on_the_gpu(cut, 0)
    assert len(cut.launches) - len(whole.launches) == more * len(SITES)
    assert len([launch for launch in cut.launches if "relu" in launch and "linalg_vector_norm" in launch]) == len(SITES)
    assert len([launch for launch in cut.launches if "_index_" in launch]) == len(SITES)
