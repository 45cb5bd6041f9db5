"""The score page in a headless browser: what the slider shows, what a patch reads, what merged, who stands beside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import chromium, press, text
from pages_made import BESIDE, GRID, HOSTILE, MAPS, SCHEDULE, photos

from passes.sites.mergers import MERGERS
from rs_compile import ClassAttention, GridPrune, Lowest, Random, Schedule, Shift
from rs_compile.visualize import SiteMap, save_page
from rs_compile.visualize.page import leaving, meaning

PHOTO, SHIFT, ATTENTION, KEPT = range(4)  # panels of a picture


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "o.html"
    save_page(path, "a <b>model</b>", [HOSTILE, "b.png"], photos(), MAPS, SCHEDULE, beside=BESIDE)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as chrome:
        yield chrome


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    browser.get(page.as_uri())
    browser.execute_async_script(
        "Promise.all([...document.images].map(i => i.decode())).then(() => setTimeout(arguments[0]))"
    )
    return browser


def pixel(browser: Any, picture: int, panel: int, x: int, y: int) -> tuple[int, ...]:
    """Of what is drawn over the photograph, at one of its pixels."""
    script = (
        "const c = document.querySelectorAll('#images section')[arguments[0]].querySelectorAll('figure')[arguments[1]]"
    )
    script += ".querySelector('canvas'), s = c.width / 48;"
    script += "return [...c.getContext('2d').getImageData(arguments[2] * s, arguments[3] * s, 1, 1).data]"
    return tuple(browser.execute_script(script, picture, panel, x, y))


def middle(browser: Any, picture: int, panel: int, cell: int) -> tuple[int, ...]:
    return pixel(browser, picture, panel, 16 * (cell % 3) + 8, 16 * (cell // 3) + 8)


def captions(browser: Any) -> list[str]:
    return [e.text for e in browser.find_elements("css selector", "#images section:first-child figcaption")]


def test_one_slider_for_maps_and_what_is_left(opened: Any) -> None:
    # blocks 0 and 3, after which something leaves, and 1 and 5, which have maps; it starts at the last cut
    assert text(opened, "#layer-name") == "block 3"
    none = ["MLP shift, l2 (none asked for)", "class attention (none: no attention op here)"]
    assert captions(opened) == ["photograph", *none, "4 tokens left of 6 patches"]
    assert text(opened, "#now") == "2 patches leave or merge into others here, 4 tokens are left of 6 patches"
    marks = [mark.get_attribute("value") for mark in opened.find_elements("css selector", "#cuts option")]
    assert marks == ["0", "2"]
    press(opened, "#layer", "ARROW_LEFT")
    assert text(opened, "#layer-name") == "block 1" and captions(opened)[1:] == [
        "MLP shift, l2",
        "class attention",
        "6 tokens left of 6 patches",
    ]
    assert text(opened, "#now") == "blocks.1: 6 tokens are left of 6 patches"
    lowest, highest = middle(opened, 0, SHIFT, 0), middle(opened, 0, SHIFT, 5)
    assert lowest[:3] == pytest.approx((68, 1, 84), abs=2) and highest[:3] == pytest.approx((253, 231, 37), abs=2)
    assert lowest[3] == highest[3] == round(0.65 * 255)
    assert [s.text for s in opened.find_elements("css selector", ".ends")][:1] == ["0\n≥ 5"]
    press(opened, "#layer", "END")
    assert (
        text(opened, "#layer-name") == "block 5"
        and captions(opened)[2] == "class attention (none: no attention op here)"
    )
    assert (middle(opened, 0, SHIFT, 0), middle(opened, 0, SHIFT, 5)) == (highest, lowest)
    assert middle(opened, 0, ATTENTION, 0) == (0, 0, 0, 0)
    press(opened, "#layer", "HOME")
    assert text(opened, "#now") == "0 patches leave or merge into others here, 6 tokens are left of 6 patches"


def test_cells_have_their_exact_borders(opened: Any) -> None:
    press(opened, "#layer", "END")
    for border in (16, 32):
        cells = [pixel(opened, 0, SHIFT, x, 8) for x in (border - 16, border - 1, border, border + 15)]
        assert cells[0] == cells[1] != cells[2] == cells[3]
    assert pixel(opened, 0, SHIFT, 8, 15) != pixel(opened, 0, SHIFT, 8, 16)


def test_what_left_is_veiled_and_what_merged_has_one_colour_and_an_outline(opened: Any) -> None:
    veil = tuple(round(c) for c in (150, 132, 196))
    first = [middle(opened, 0, KEPT, cell) for cell in range(6)]
    assert first[2][:3] == pytest.approx(veil, abs=2) and first[2][3] == round(0.65 * 255)
    assert first[0][3] == first[3][3] == first[5][3] == 0  # alone and left: the photograph
    # white and red patches became one token: their mean
    assert first[1] == first[4] and first[1][:3] == pytest.approx((255, 128, 128), abs=6)
    # an outline around both, and none between them
    assert pixel(opened, 0, KEPT, 16, 8)[3] == 255 and pixel(opened, 0, KEPT, 32, 24)[3] == 255
    assert pixel(opened, 0, KEPT, 24, 16) == first[1]
    assert pixel(opened, 0, KEPT, 8, 16)[3] == 0
    second = [middle(opened, 1, KEPT, cell)[3] > 0 for cell in range(6)]
    assert second == [True, False, False, True, True, False]
    legend = text(opened, ".key")
    assert "has left" in legend and "became one token" in legend


def test_a_patch_tells_its_score(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    press(opened, "#layer", "HOME")
    press(opened, "#layer", "ARROW_RIGHT")
    canvas = opened.find_elements("css selector", "canvas")[3]  # the second picture's shift
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    size = canvas.size
    ActionChains(opened).move_to_element_with_offset(canvas, size["width"] // 3, -size["height"] // 4).perform()
    readings = [e.text for e in opened.find_elements("css selector", ".reading")]
    assert readings[3:] == ["row 0, column 2: 20, rank 4 of 6", "row 0, column 2: 0.375, rank 3 of 6",
                            "row 0, column 2: left"]  # fmt: skip
    assert readings[:3] == ["", "", ""]
    press(opened, "canvas", "ARROW_RIGHT")
    press(opened, "canvas", "ARROW_DOWN")
    assert text(opened, ".reading") == "row 1, column 0: 3, rank 3 of 6"
    for _ in range(3):
        press(opened, "canvas", "ARROW_DOWN")  # stays inside
    assert text(opened, ".reading") == "row 1, column 0: 3, rank 3 of 6"


def test_a_merged_patch_tells_how_many_it_is_one_with(opened: Any) -> None:
    for _ in range(2):  # cells 0 and 1
        press(opened, "canvas", "ARROW_RIGHT", 2)
    assert text(opened, ".reading", 2) == "row 0, column 1: one token with 1 more"
    tops = [pixel(opened, 0, KEPT, 16 * (cell % 3) + 8, 16 * (cell // 3))[3] for cell in (1, 4, 0, 3)]
    assert tops == [255, 255, 0, 0]  # cell 4, which it is one with, is outlined as well
    press(opened, "canvas", "ARROW_RIGHT", 2)
    assert text(opened, ".reading", 2) == "row 0, column 2: has left"


def test_a_page_of_pruning_alone(browser: Any, tmp_path: Path) -> None:
    stands = torch.tensor([[[0, -1, 2], [3, -1, 5]]]).repeat(2, 1, 1)
    maps = replace(MAPS, sites=(SiteMap(1, GRID, stands, 5, 7),))
    save_page(tmp_path / "o.html", "Vit", ["a.png", "b.png"], photos(), maps, Schedule({1: 0.7}))
    browser.get((tmp_path / "o.html").as_uri())
    assert captions(browser)[KEPT] == "4 of 6 patches left"
    assert text(browser, "#now") == "blocks.1: 2 patches leave here, 4 of 6 patches are left"
    assert "has left" in text(browser, ".key") and "became one token" not in text(browser, ".key")
    assert [middle(browser, 0, KEPT, cell)[3] > 0 for cell in range(6)] == [False, True, False, False, True, False]
    assert text(browser, ".figures") == "Patches left at the end\n4\nof 6 patches"  # nobody measured speed


def test_toggles_and_opacity(opened: Any) -> None:
    opened.find_element("css selector", "#show-attention").click()
    shown = [f.is_displayed() for f in opened.find_elements("css selector", "figure")]
    assert shown == [True, True, False, True] * 2
    press(opened, "#opacity", "END")
    assert middle(opened, 0, KEPT, 2)[3] == 255 and text(opened, "#opacity-name") == "100%"


def test_drift_and_speed_stand_beside(opened: Any) -> None:
    figures = text(opened, ".figures")
    assert "\n0.2\n" in figures and "2.00× as fast" in figures and "as torch.compile(model)" in figures
    overs = [e.text for e in opened.find_elements("css selector", "#images .over")]
    assert overs == ["drift of the output 0.1", "drift of the output 0.3"]


def test_names_are_text(opened: Any) -> None:
    assert text(opened, "h1") == "a <b>model</b>" and opened.title == "Score maps: a <b>model</b>"
    heading = opened.find_elements("css selector", "h3")[0].get_attribute("textContent")
    assert heading == HOSTILE
    assert len(opened.find_elements("css selector", "img")) == 8  # the photographs, and no other


def test_each_control_has_a_name(opened: Any) -> None:
    for control in opened.find_elements("css selector", "input, canvas, button"):
        assert control.accessible_name


def test_what_the_score_is_and_what_leaves_by_it() -> None:
    assert "the L2 distance between a token x and F(x), where F is the block's MLP:" in meaning(Shift(), "block")
    skip = meaning(Shift(of="attention", metric="cosine", with_skip=True), "block")
    assert "the cosine distance between a token x and x + F(x), where F is the block's attention:" in skip
    assert "in front of the block and behind it" in meaning(Shift(of="block"), "block")
    assert "what the stage makes of a cell" in meaning(Shift(metric="l1"), "stage")
    said = leaving(SCHEDULE, MAPS)
    assert said[0] == "In block 3 tokens merge, chosen by what adds least to the variance of keys and values (Ward)."
    assert "Of 6 patches 4 tokens are left at the end." in said and any(
        "One more token, the class token" in s for s in said
    )
    words = [leaving(replace(SCHEDULE, by=merger()), MAPS)[0] for merger in MERGERS.values()]
    assert (
        len(set(words)) == len(MERGERS) and "ranked by importance (DiffRate)." in words[list(MERGERS).index("diffrate")]
    )
    pruned = leaving(Schedule({0: 0.8, 3: 0.8, 6: 0.5}, score=Lowest(ClassAttention())), MAPS)
    stages = replace(MAPS, unit="stage", sites=(SiteMap(0, GRID, MAPS.sites[0].stands, 20, 24), MAPS.sites[0]))
    lines = leaving(Schedule(grid={0: GridPrune(1, 1), 1: GridPrune(1, 1)}, score=Random()), stages)
    assert lines[:2] == ["After stages 0 and 1 rows and columns leave at random.", "Of 6 cells 6 are left at the end."]
    assert pruned[0] == "After blocks 0, 3 and 6 the tokens of the highest class attention leave."
