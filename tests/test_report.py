"""Reports: the table that a user reads, word for word, and the JSON with the same content."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from hypothesis import given
from hypothesis import strategies as st

from passes.graph.base import Skip
from rs_compile.report import BlockRow, Explanation, ExplanationRow, Report

SKIPS = (
    Skip("softmax", "softmax over channels, not over keys", 'File "vit.py", line 3, in forward: a.softmax(1)'),
    Skip("softmax_1", "softmax over channels, not over keys", 'File "vit.py", line 9, in forward: b.softmax(1)'),
    Skip("softmax_2", "softmax over channels, not over keys", 'File "vit.py", line 9, in forward: b.softmax(1)'),
    Skip("mul", "scale is a tensor"),
)
SKIP_LINES = """\
skipped:
  3x softmax over channels, not over keys
     at File "vit.py", line 3, in forward: a.softmax(1) (and 1 more)
  1x scale is a tensor
     at node mul"""

REPORT = Report(
    model="VisionTransformer",
    signature="[B, 3, 224, 224] float32 on cpu",
    blocks=(
        BlockRow(0, "blocks.0", 197, 158, 363_275_520, 363_275_520, "flash"),
        BlockRow(1, "blocks.1", 158, 158, 363_275_520, 287_000_000, "math", "mask needs a gradient"),
        BlockRow(10, "stages.3", None, None, 1_000_000, 500_000),
    ),
    macs_dense=1_253_683_200,
    macs=800_123_456,
    flops_dense=1_258_411_200,
    flops=804_900_000,
    skips=SKIPS,
)

ROWS = (
    ExplanationRow(0, "blocks.0", "attention + mlp", 197, "flash", "", True),
    ExplanationRow(1, "blocks.1", "attention + mlp", 197, "math", "float64", True),
    ExplanationRow(None, "stem", "convolution", None, "", "", False, "no token axis"),
)


def lines(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines())


def test_report_as_a_table() -> None:
    assert lines(str(REPORT)) == (
        """\
VisionTransformer, [B, 3, 224, 224] float32 on cpu
  block  where                 tokens in    out    GMACs dense    GMACs  attention    why not flash
-------  ------------------  -----------  -----  -------------  -------  -----------  ---------------------
      0  blocks.0                    197    158          0.363    0.363  flash
      1  blocks.1                    158    158          0.363    0.287  math         mask needs a gradient
     10  stages.3                      -      -          0.001    0.001  -
   rest  outside the blocks                              0.526    0.149
  total                                                  1.254    0.800
GFLOPs (fvcore's convention, one sample): 1.258 -> 0.805, a ratio of 1.56
"""
        + SKIP_LINES
    )


def test_a_column_without_content_is_left_out() -> None:
    flash = replace(REPORT, blocks=REPORT.blocks[:1], skips=())
    assert "why not flash" not in str(flash)
    assert "skipped" not in str(flash)
    assert "0  blocks.0                    197    158          0.363    0.363  flash" in str(flash)


def test_a_report_without_blocks_has_its_totals() -> None:
    empty = Report("Identity", "[B, 4] float32 on cpu", (), 0, 0, 0, 0)
    assert lines(str(empty)).splitlines()[-2].split() == ["total", "0.000", "0.000"]
    assert str(empty).splitlines()[-1] == "GFLOPs (fvcore's convention, one sample): 0.000 -> 0.000"


def test_tokens_of_each_of_several_sequences() -> None:
    row = replace(REPORT.blocks[0], sequences=16)
    cells = str(replace(REPORT, blocks=(row,))).splitlines()[3].split("  ")
    assert [cell.strip() for cell in cells if " x " in cell] == ["16 x 197", "16 x 158"]
    assert "16 x 197" in str(Explanation("Vit", (replace(ROWS[0], sequences=16),)))


def test_a_long_reason_wraps_and_a_refusal_stays_indented() -> None:
    reason = "the additive mask is a tensor of float64, which none of the fused kernels take on this device"
    blocks = (replace(REPORT.blocks[1], kernel_reason=reason),)
    text = str(replace(REPORT, blocks=blocks, skips=(Skip("x", "one\n  way out: two"),)))
    assert max(map(len, text.splitlines())) < 150
    assert text.endswith("skipped:\n  1x one\n       way out: two\n     at node x")


def test_report_as_json() -> None:
    content = json.loads(REPORT.to_json())
    assert list(content) == ["model", "signature", "blocks", "stages", "merging", "guard", "totals", "skips"]
    assert content["blocks"][1] == {
        "block": 1,
        "where": "blocks.1",
        "tokens_in": 158,
        "tokens_out": 158,
        "macs_dense": 363275520,
        "macs": 287000000,
        "attention_kernel": "math",
        "kernel_reason": "mask needs a gradient",
        "sequences": 1,
    }
    assert content["blocks"][2]["tokens_in"] is None
    assert content["totals"] == {
        "macs_dense": 1253683200,
        "macs": 800123456,
        "flops_dense": 1258411200,
        "flops": 804900000,
    }
    assert content["skips"] == [asdict(skip) for skip in SKIPS]


def test_explanation_as_a_table() -> None:
    note = "token 0 is protected: it is joined in front of the patches"
    assert lines(str(Explanation("VisionTransformer", ROWS, SKIPS, (note,)))) == (
        """\
VisionTransformer
  block  where     kind               tokens  attention    why not flash    prunable    why not
-------  --------  ---------------  --------  -----------  ---------------  ----------  -------------
      0  blocks.0  attention + mlp       197  flash                         yes
      1  blocks.1  attention + mlp       197  math         float64          yes
      -  stem      convolution             -  -                             no          no token axis
"""
        + SKIP_LINES
        + "\nnote: token 0 is protected: it is joined in front of the patches"
    )


def test_an_explanation_of_nothing_says_so() -> None:
    assert str(Explanation("Identity", ())) == "Identity\nno block found that tokens could leave after"


def test_an_explanation_says_where_tokens_are_back() -> None:
    rows = (replace(ROWS[0], until="the end of block 1"), ROWS[1])
    table = lines(str(Explanation("VisionTransformer", rows))).splitlines()
    assert table[1].endswith("prunable    until")
    assert table[3].endswith("yes         the end of block 1") and table[4].endswith("yes")


def test_explanation_as_json() -> None:
    content = json.loads(Explanation("Vit", ROWS, SKIPS[3:], ("a note",)).to_json())
    assert content["model"] == "Vit"
    assert content["rows"] == [asdict(row) for row in ROWS]
    assert content["rows"][1]["prunable"] is True
    assert content["skips"] == [{"node": "mul", "reason": "scale is a tensor", "where": "", "way_out": ""}]
    assert content["notes"] == ["a note"]


@given(
    st.lists(
        st.builds(
            BlockRow,
            block=st.integers(0, 99),
            where=st.text(max_size=9),
            tokens_in=st.none() | st.integers(1, 5000),
            tokens_out=st.none() | st.integers(1, 5000),
            macs_dense=st.integers(0, 10**13),
            macs=st.integers(0, 10**13),
            attention_kernel=st.sampled_from(["", "flash", "math"]),
            kernel_reason=st.text(max_size=60),
            sequences=st.integers(1, 16),
        ),
        max_size=4,
    )
)
def test_json_keeps_every_row(blocks: list[BlockRow]) -> None:
    report = replace(REPORT, blocks=tuple(blocks))
    assert tuple(BlockRow(**row) for row in json.loads(report.to_json())["blocks"]) == report.blocks
    assert str(report)
