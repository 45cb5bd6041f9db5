"""The page in a headless browser: what a slider shows, what a patch reads, and that nothing in a file name runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from passes.network.patch_grid import Extent, PatchGrid
from rs_compile.visualize import LayerMaps, ScoreMaps, SiteMap, save_page
from rs_compile.visualize.page import embedded

HOSTILE = "</script><img src=x onerror=\"document.title='run'\">&amp; $1\u2028.png"
GRID = PatchGrid(Extent(2, 0, 16, 16), Extent(3, 0, 16, 16), (None, *range(6)))
SIZE = (32, 48)
# two layers of two images; the second image's are ten times as much
VALUES = torch.tensor([[[0.0, 1, 2], [3, 4, 5]], [[5.0, 4, 3], [2, 1, 0]]])
LAYERS = tuple(
    LayerMaps(block, f"blocks.{block}", GRID, torch.stack([v, 10 * v]), attention, "class attention")
    for block, v, attention in ((1, VALUES[0], torch.stack([VALUES[1] / 8] * 2)), (5, VALUES[1], None))
)
KEPT = torch.tensor([[True, False, True], [True, True, False]])
SITES = (
    SiteMap(0, GRID, torch.ones(2, 2, 3, dtype=torch.bool), 7, 7),
    SiteMap(3, GRID, torch.stack([KEPT, ~KEPT]), 5, 7),
)
MAPS = ScoreMaps(SIZE, "block", "MLP shift, l2", LAYERS, SITES)


def test_embedded_json_reads_back_and_ends_no_script() -> None:
    content = {HOSTILE: ["<!--", "]]>", 1.5, None]}
    text = embedded(content)
    assert not re.search("[<>&\u2028]", text)
    assert json.loads(text) == content


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "o.html"
    black = np.zeros((*SIZE, 3))
    save_page(path, "a <b>model</b>", [HOSTILE, "b.png"], [black, black], MAPS)
    return path


def test_the_page_is_one_file(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|<link|<iframe", text)
    assert text.count("<script") == text.count("</script>") == 2
    assert len(text) < 30_000


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Any]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    browser.get(page.as_uri())
    return browser


def text(browser: Any, selector: str, at: int = 0) -> str:
    return str(browser.find_elements("css selector", selector)[at].text)


def pixel(browser: Any, panel: int, x: int, y: int) -> tuple[int, ...]:
    script = "const c = document.querySelectorAll('canvas')[arguments[0]].getContext('2d');"
    script += "return [...c.getImageData(arguments[1], arguments[2], 1, 1).data]"
    return tuple(browser.execute_script(script, panel, x, y))


def press(browser: Any, selector: str, key: str, at: int = 0) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.find_elements("css selector", selector)[at].send_keys(getattr(Keys, key))


def test_the_slider_changes_the_layer(opened: Any) -> None:
    captions = [e.text for e in opened.find_elements("css selector", "figcaption")]
    assert captions[:3] == ["block 1: MLP shift, l2", "block 1: class attention", "after block 3: 5 of 7 tokens"]
    assert text(opened, "#layer-name") == "block 1" and text(opened, "#site-name") == "block 3"
    lowest, highest = pixel(opened, 0, 0, 0), pixel(opened, 0, 47, 31)
    assert lowest[:3] != highest[:3] and lowest[3] == highest[3] == round(0.65 * 255)
    assert [s.text for s in opened.find_elements("css selector", ".ends")][:1] == ["0\n≥ 5"]
    press(opened, "#layer", "ARROW_RIGHT")
    assert text(opened, "#layer-name") == "block 5" and text(opened, "figcaption") == "block 5: MLP shift, l2"
    assert (pixel(opened, 0, 0, 0), pixel(opened, 0, 47, 31)) == (highest, lowest)
    assert text(opened, "figcaption", 1) == "block 5: class attention (none: no attention op here)"
    assert pixel(opened, 1, 0, 0) == (0, 0, 0, 0)
    logged = [entry for entry in opened.get_log("browser") if entry["source"] != "rendering"]  # `pixel` reads canvases
    assert not logged
    loaded = opened.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("data:") for name in loaded)


def test_cells_have_their_exact_borders(opened: Any) -> None:
    for border in (16, 32):
        cells = [pixel(opened, 0, x, 0) for x in (border - 16, border - 1, border, border + 15)]
        assert cells[0] == cells[1] != cells[2] == cells[3]
    assert pixel(opened, 0, 0, 15) != pixel(opened, 0, 0, 16)


def test_tokens_left_after_each_site(opened: Any) -> None:
    def gone(panel: int) -> list[list[bool]]:
        return [[pixel(opened, panel, 16 * c + 8, 16 * r + 8)[3] > 0 for c in range(3)] for r in range(2)]

    assert gone(2) == (~KEPT).tolist() and gone(5) == KEPT.tolist()
    press(opened, "#site", "ARROW_LEFT")
    assert text(opened, "figcaption", 2) == "after block 0: 7 of 7 tokens" and not any(map(any, gone(2)))


def test_a_patch_tells_its_score(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    canvas = opened.find_elements("css selector", "canvas")[3]  # the second image's shift
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    size = canvas.size
    ActionChains(opened).move_to_element_with_offset(canvas, size["width"] // 3, -size["height"] // 4).perform()
    readings = [e.text for e in opened.find_elements("css selector", ".reading")]
    assert readings[3:] == ["row 0, column 2: 20, rank 4 of 6", "row 0, column 2: 0.375, rank 3 of 6",
                            "row 0, column 2: gone"]  # fmt: skip
    assert readings[:3] == ["", "", ""]
    press(opened, "canvas", "ARROW_RIGHT")
    press(opened, "canvas", "ARROW_DOWN")
    assert text(opened, ".reading") == "row 1, column 0: 3, rank 3 of 6"
    for _ in range(3):
        press(opened, "canvas", "ARROW_DOWN")  # stays inside
    assert text(opened, ".reading") == "row 1, column 0: 3, rank 3 of 6"


def test_toggles_and_opacity(opened: Any) -> None:
    opened.find_element("css selector", "#show-attention").click()
    shown = [f.is_displayed() for f in opened.find_elements("css selector", "figure")]
    assert shown == [True, False, True] * 2
    press(opened, "#opacity", "END")
    assert pixel(opened, 0, 0, 0)[3] == 255 and text(opened, "#opacity-name") == "100%"


def test_names_are_text(opened: Any) -> None:
    assert text(opened, "h1") == "a <b>model</b>" and opened.title == "Score maps: a <b>model</b>"
    heading = opened.find_elements("css selector", "h2")[0].get_attribute("textContent")
    assert heading == HOSTILE
    assert len(opened.find_elements("css selector", "img")) == 6  # the photographs, and no other


def test_each_control_has_a_name(opened: Any) -> None:
    for control in opened.find_elements("css selector", "input, canvas"):
        assert control.accessible_name
