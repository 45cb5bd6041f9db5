"""How many kernels an H100 would launch for a rewritten graph, counted in Inductor's code; no GPU is needed."""

from __future__ import annotations

import re
from functools import cache
from typing import Literal

import pytest
from cases import DEPTH, SITES, cnn, cut, kept, merged, transformer
from triton_kernels import sources

from bench.gpu.lowering import Generated, generate
from rs_compile import Schedule

pytestmark = pytest.mark.inductor

FLASH = "torch.ops.aten._scaled_dot_product_flash_attention.default"


@cache
def dense(tokens: int) -> Generated:
    return generate(transformer(tokens, Schedule()), batch=64)


@cache
def pruned(tokens: int) -> Generated:
    return generate(transformer(tokens, kept()), batch=64)


@cache
def whole_cnn() -> Generated:
    return generate(cnn(197, Schedule()), batch=8)


def check_all_on_the_gpu(generated: Generated, attentions: int) -> None:
    """One flash launch an attention and no softmax, nothing on the host, no size that is not known."""
    launches, body = generated.launches, generated.body
    assert launches.count(FLASH) == attentions
    assert not [launch for launch in launches if "softmax" in launch or "scaled_dot_product_attention" in launch]
    assert not re.search(r"\.item\(|\.tolist\(|_local_scalar_dense|device_put|'cpu'|\"cpu\"|_cpu\(", body)
    assert not re.search(r"\b[su]\d+\b", body)
    assert generated.records_cuda_graph


def check_rows_are_sorted_one_by_one(generated: Generated) -> None:
    """Of rows below 256 entries Inductor tries many in one program too, and ptxas takes minutes for each such."""
    sorting = [source for source in sources(generated).values() if "sort_with_index" in source]
    rows = [re.search(r"size_hints=\{'x': \d+, 'r0_': (\d+)\}", source) for source in sorting]
    assert rows and all(row is not None and int(row.group(1)) >= 256 for row in rows)


def behind(launches: list[str], site: int) -> list[str]:
    """The launches from the end of a block to the first matrix product of the next one."""
    products = [i for i, launch in enumerate(launches) if launch == "extern_kernels.addmm"]
    first, last = products[4 * site + 3], products[4 * site + 4]
    return launches[first + 1 : last]


@pytest.mark.slow
def test_the_dense_transformer_launches_nothing_to_spare() -> None:
    """The baseline: a block's end is one kernel, the residual add and the next norm."""
    launches = dense(197).launches
    assert [len(behind(launches, site)) for site in SITES] == [1, 1, 1]
    check_all_on_the_gpu(dense(197), DEPTH)


def test_two_more_launches_a_site() -> None:
    generated = pruned(197)
    assert len(generated.launches) - len(dense(197).launches) == 2 * len(SITES)
    check_all_on_the_gpu(generated, DEPTH)
    check_rows_are_sorted_one_by_one(generated)


def test_unread_tokens_take_at_most_three_more_launches_in_all() -> None:
    """In the last block: queries, keys and values each by themselves, and the class token's queries made ready."""
    generated = generate(transformer(197, kept(), drop_unread=True), batch=64)
    # three by themselves; two were seen once behind other tests in the same process
    assert 0 < len(generated.launches) - len(pruned(197).launches) <= 3
    check_all_on_the_gpu(generated, DEPTH)


@pytest.mark.slow
def test_three_more_launches_a_site_above_512_tokens() -> None:
    generated = pruned(577)
    # block by block as at 197 tokens: the dense graph's launches do not depend on N
    assert len(generated.launches) - len(dense(197).launches) == 3 * len(SITES)
    check_all_on_the_gpu(generated, DEPTH)
    check_rows_are_sorted_one_by_one(generated)


@pytest.mark.slow
def test_the_dense_graph_launches_as_much_at_577_tokens() -> None:
    assert len(dense(577).launches) == len(dense(197).launches)


def test_score_select_gather_are_three_kernels() -> None:
    for site in SITES:
        score, select, gather = behind(pruned(197).launches, site)
        assert "add_" in score and "linalg_vector_norm" in score  # the residual add is in it
        assert select.count("sort") == 1  # both sorts
        assert "add_expand_gather_native_layer_norm" in gather


@pytest.mark.slow
def test_above_512_tokens_selecting_takes_a_call() -> None:
    for site in SITES:
        score, *select, gather = behind(pruned(577).launches, site)
        assert "add_" in score and "linalg_vector_norm" in score
        assert len(select) == 2 and select[0] == "torch.ops.aten.topk.default" and "sort" in select[1]
        assert "add_expand_gather_native_layer_norm" in gather


@pytest.mark.parametrize("tokens", [197, pytest.param(577, marks=pytest.mark.slow)])
def test_the_score_takes_the_prefix_mask(tokens: int) -> None:
    """One kernel reads the terms of the residual sum and stores what is selected by: NaN where a token is protected."""
    code = sources(pruned(tokens))
    for site in SITES:
        score, *select, _ = (code.get(launch, "") for launch in behind(pruned(tokens).launches, site))
        assert score.count("tl.load(") == 3 and score.count("tl.store(") == 1
        assert 'float("nan")' in score
        assert not any("nan" in text for text in select)


@pytest.mark.parametrize("tokens", [197, pytest.param(577, marks=pytest.mark.slow)])
def test_tokens_are_gathered_once_a_site(tokens: int) -> None:
    assert sum("gather" in launch for launch in pruned(tokens).launches) == len(SITES)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [197, 577])
def test_many_samples_are_not_sorted(tokens: int) -> None:
    """Three launches a site for any N: score, every two scores compared, positions put in order."""
    generated = generate(transformer(tokens, kept(), samples=1024), batch=1024)
    check_all_on_the_gpu(generated, DEPTH)
    assert len(generated.launches) - len(dense(197).launches) == 3 * len(SITES)
    assert not [launch for launch in generated.launches if "sort" in launch or "topk" in launch]
    code = sources(generated)
    for site in SITES:
        score, compare, order, gather = (code[launch] for launch in behind(generated.launches, site))
        assert score.count("tl.store(") == 1 and 'float("nan")' in score and 'float("nan")' not in compare + order
        assert "gather_native_layer_norm" in gather


@pytest.mark.slow
def test_inductors_own_threshold_would_gather_again() -> None:
    """Why `inductor_options` sets it."""
    plain = generate(transformer(197, kept()), batch=64, realize_reads_threshold=4)
    assert len(plain.launches) == len(pruned(197).launches)
    assert sum("gather" in launch for launch in plain.launches) > len(SITES)


@pytest.mark.parametrize("tokens", [197, pytest.param(577, marks=pytest.mark.slow)])
def test_merging_with_size_bias_stays_on_flash(tokens: int) -> None:
    """A merge makes six launches more, for any N; an attention behind one two, for its padded heads and back."""
    generated = generate(transformer(tokens, merged()), batch=64)
    check_all_on_the_gpu(generated, DEPTH)
    assert len(generated.launches) - len(dense(197).launches) == len(SITES) * (6 + 2)
    sums, similar, *found, add, norm = behind(generated.launches, 0)
    assert "add_" in sums and similar == "extern_kernels.bmm"  # the features' norm takes the residual add
    assert [("max" in launch, "sum" in launch) for launch in found] == [
        (True, False),  # each source's destination
        (False, True),  # its place among sources
        (False, True),  # every token's place, the new order, and the sizes
    ]
    assert "scatter_add" in add and "gather_native_layer_norm" in norm
    assert not [launch for launch in generated.launches if "sort" in launch]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [197, pytest.param(577, marks=pytest.mark.slow)])
def test_merging_at_the_inputs_of_attention(tokens: int) -> None:
    """Nine launches more, for any N; the residual add, the shift and the gather of the stream are in kernels beside."""
    generated = generate(transformer(tokens, merged("ward")), batch=64)
    check_all_on_the_gpu(generated, DEPTH)
    launches = generated.launches
    assert len(launches) - len(dense(197).launches) == len(SITES) * 9 + DEPTH * 2
    products = [i for i, launch in enumerate(launches) if launch == "extern_kernels.addmm"]
    for site in SITES:
        *found, pad, flash, back = launches[products[4 * site] + 1 : products[4 * site + 1]]
        squares, similar, (best, place, order), values = found[:2], found[2:4], found[4:7], found[7:]
        assert all("pow_sum" in launch for launch in squares)  # of keys, of values
        assert similar == ["extern_kernels.bmm"] * 2
        assert "max" in best and all("scatter" in launch and "sum" in launch for launch in (place, order))
        assert all("scatter_add" in launch for launch in values)  # gathered at the short length, and what merges added
        assert "pad" in pad and flash == FLASH and "clone" in back
        assert site == 0 or "linalg_vector_norm" in best  # what the shift is ends in the cost
    assert not [launch for launch in launches if "sort" in launch]


@pytest.mark.parametrize("mode", ["line", pytest.param("token", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tokens", [197, pytest.param(577, marks=pytest.mark.slow)])
def test_rows_and_columns_of_a_cnn(tokens: int, mode: Literal["line", "token"]) -> None:
    """The score in the last add and ReLU of the stage. Lines, three launches a site: the means of both, the selection
    of both, one gather. Cells, five: columns of each row and rows of each column left, in two each, one gather."""
    generated = generate(cnn(tokens, cut(mode)), batch=8)
    check_all_on_the_gpu(generated, 0)
    if mode == "line":
        check_rows_are_sorted_one_by_one(generated)
    launches = generated.launches
    assert len(launches) - len(whole_cnn().launches) == (3 if mode == "line" else 5) * len(SITES)
    assert len([launch for launch in launches if "relu" in launch and "linalg_vector_norm" in launch]) == len(SITES)
    assert len([launch for launch in launches if "_index_" in launch]) == len(SITES)
    assert len([launch for launch in launches if "sort" in launch]) == len(SITES) * (mode == "line")


@pytest.mark.slow
def test_lines_of_many_samples_are_not_sorted() -> None:
    """One launch more a site than for few: there are a row and a column of means for each sample."""
    generated = generate(cnn(197, cut("line"), samples=512), batch=512)
    check_all_on_the_gpu(generated, 0)
    assert len(generated.launches) - len(whole_cnn().launches) == 4 * len(SITES)
    assert not [launch for launch in generated.launches if "sort" in launch or "topk" in launch]
