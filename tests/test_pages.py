"""Results as pages, in a browser: self-contained, readable by keys and by ear, and with the numbers that went in."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from browser import chromium, faults, logged, looks_like, press, text
from pages_made import (
    BESIDE,
    GPU_STEPS,
    GRID_REPORT,
    HOSTILE,
    MAPS,
    REPORT,
    SCHEDULE,
    demo,
    gpu_journal,
    photos,
    search_result,
    sweep,
)

from bench.gpu.report import write_report
from rs_compile import CompileError, Schedule
from rs_compile.cli import main
from rs_compile.demo.page import page as demo_page
from rs_compile.pages import VIRIDIS, check_page, render
from rs_compile.search import command
from rs_compile.search.page import Axis
from rs_compile.visualize import save_page

PAGES = ("report", "grid", "bench", "compare", "search", "maps", "demo", "gpu")
DRAWN = ("demo", "gpu")
DEMO_PICTURE = Path(__file__).parents[1] / "docs" / "img" / "demo.png"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    REPORT.to_html(folder / "report.html")
    GRID_REPORT.to_html(folder / "grid.html")
    sweep().to_html(folder / "bench.html")
    BESIDE.to_html(folder / "compare.html")
    search_result().to_html(folder / "search.html")
    save_page(folder / "maps.html", "a <b>model</b>", [HOSTILE, "b.png"], photos(), MAPS, SCHEDULE, beside=BESIDE)
    (folder / "demo.html").write_text(demo_page(demo(), DEMO_PICTURE.read_bytes()), encoding="utf-8")
    write_report(gpu_journal(folder / "gpu"), GPU_STEPS)
    (folder / "gpu" / "report.html").rename(folder / "gpu.html")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as chrome:
        yield chrome


@pytest.mark.parametrize("name", PAGES)
def test_each_page_is_one_file(pages: Path, name: str) -> None:
    page = (pages / f"{name}.html").read_text(encoding="utf-8")
    if name in DRAWN:  # what a plot names is looked at by the browser, below
        page = re.sub(r"<svg.*?</svg>| src=\"data:image/png;base64,[^\"]*\"", "", page, flags=re.DOTALL)
    assert not re.search(r"https?:|url\(|@import|<link|<iframe| src=(?!x)", page)
    assert page.count("<script") == page.count("</script>") == (3 if name == "maps" else 1)
    assert len(page) < 60_000


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_each_page_is_for_everyone(pages: Path, browser: Any, name: str, width: int, scheme: str) -> None:
    looks_like(browser, width, scheme)
    browser.get((pages / f"{name}.html").as_uri())
    assert faults(browser) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    shades = [int(shade) for shade in re.findall(r"\d+", back)]
    assert max(shades) < 60 if scheme == "dark" else min(shades) > 200
    browser.find_element("css selector", "#scheme").click()
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != back
    assert not logged(browser)
    assert browser.execute_script(
        "return performance.getEntriesByType('resource').every(e => e.name.startsWith('data:'))"
    )
    assert "run" not in browser.title and not browser.find_elements("css selector", "h1 b, img[src=x]")


def bars(browser: Any, row: int, column: int) -> list[int]:
    """Widths of a cell's bars, in percent."""
    script = "return [...document.querySelectorAll('#blocks ~ .wide tbody tr')[arguments[0]].cells[arguments[1]]"
    script += ".querySelectorAll('.bar > i')].map(bar => Math.round(parseFloat(bar.style.width)))"
    return list(browser.execute_script(script, row, column))


def test_the_report_by_block(pages: Path, browser: Any) -> None:
    looks_like(browser, 1280, "light")
    browser.get((pages / "report.html").as_uri())
    rows = [
        row.text for row in browser.find_elements("css selector", "#blocks ~ .wide tbody tr, #blocks ~ .wide tfoot tr")
    ]
    assert rows[0].split() == ["0", "blocks.0", "200", "→", "150", "−50", "0.400", "flash"]
    assert rows[1].split() == ["1", "blocks.1", "150", "0.400", "→", "0.300", "math"]
    assert "no token axis" in rows[3] and HOSTILE.split("\u2028")[0] in rows[3].replace("\n", " ")
    assert rows[4].split() == ["rest", "outside", "the", "blocks", "0.099", "→", "0.050"]
    assert rows[5].split() == ["total", "1.300", "→", "1.050"]
    assert bars(browser, 0, 1) == [100, 75] and bars(browser, 1, 1) == [75, 75] and bars(browser, 1, 2) == [100, 75]
    assert [cell.text for cell in browser.find_elements("css selector", ".figures .main")] == [
        "1.24× fewer",
        "150",
        "1 of 3",
    ]
    kernels = [row.text for row in browser.find_elements("css selector", "#attention ~ .wide tbody tr")]
    assert kernels == ["flash 0 it is flash", "math 1, 2 mask needs a gradient"]
    skips = [row.text for row in browser.find_elements("css selector", "#skipped ~ .wide tbody tr")]
    assert skips[0] == '2 softmax over channels call F.scaled_dot_product_attention File "vit.py", line 3: a.softmax(1)'
    assert skips[1].startswith("1 </script>") and skips[1].endswith("– node mul")
    assert "Merging: ward, no size bias." in text(browser, "main")


def test_the_report_by_stage(pages: Path, browser: Any) -> None:
    browser.get((pages / "grid.html").as_uri())
    assert "16 × 16 → 8 × 16" in text(browser, "#blocks ~ .wide tbody tr") and bars(browser, 0, 1) == [100, 50]
    assert "Nothing was skipped." in text(browser, "main")


def test_speed_beside_the_baseline(pages: Path, browser: Any) -> None:
    browser.get((pages / "bench.html").as_uri())
    rows = [row.text for row in browser.find_elements("css selector", "#speed ~ .wide tbody tr")]
    assert len(rows) == 6 and rows[0].startswith("torch.compile(model) 300.00 ms 3.3 samples a second")
    assert rows[4].startswith("rs_compile 200.00 ms 80.0 samples a second")
    assert "2.00× quartiles 1.75 to 2.00" in rows[4]
    ticks = browser.execute_script("return [...document.querySelectorAll('.bar b')].slice(0, 3).map(b => b.style.left)")
    assert [round(float(tick[:-1]), 1) for tick in ticks] == [33.3, 66.7, 50.0]  # of the longest call, 0.6 s


def test_drift_of_each_output(pages: Path, browser: Any) -> None:
    browser.get((pages / "compare.html").as_uri())
    rows = [row.text for row in browser.find_elements("css selector", "#drift ~ .wide tbody tr")]
    assert rows[0].startswith("pooled 0.20000 ± 0.10000") and rows[0].endswith("0.30000 sample 1, counted from 0")
    assert rows[1].startswith("last 0.01000 ± 0.01000")
    assert "50.0%" in text(browser, ".figures") and "KL 0.25 nats" in text(browser, ".figures")


def dots(browser: Any) -> dict[str, tuple[float, float]]:
    """Middle of each point that is shown, by its name."""
    script = "return [...document.querySelectorAll('.dot:not([hidden])')].map(dot => {"
    script += (
        " const b = dot.getBoundingClientRect(); return [dot.dataset.name, b.x + b.width / 2, b.y + b.height / 2] })"
    )
    return {name: (x, y) for name, x, y in browser.execute_script(script)}


def test_the_front_of_a_search(pages: Path, browser: Any) -> None:
    looks_like(browser, 1280, "light")
    browser.get((pages / "search.html").as_uri())
    script = "return [...document.querySelectorAll('.dot')].map(dot => [dot.dataset.name, dot.dataset.searched])"
    heights = [(name.split(",")[0], float(height)) for name, height in browser.execute_script(script)]
    assert [name for name, _ in heights] == ["prune: shift", "prune: random", "Ward", "prune: shift"]  # by cost
    # logarithmic: 0.5 at the top, 0.01 at the bottom
    assert heights[1][1] == 96 and heights[2][1] == 4
    assert heights[0][1] == pytest.approx(4 + 92 * np.log(10) / np.log(50), abs=0.01)
    filled = [dot.get_attribute("data-name") for dot in browser.find_elements("css selector", ".dot.front")]
    assert filled == ["prune: shift, uniform from 1", "Ward, uniform from 1 (chosen)"]
    assert "ToMe compares keys" in text(browser, "#refused ~ .wide") and "1 more could not be made as cheap" in text(
        browser, "main"
    )


def test_points_are_read_and_copied_by_keys(pages: Path, browser: Any) -> None:
    looks_like(browser, 1280, "light")
    browser.get((pages / "search.html").as_uri())
    browser.execute_script("window.copied = []; navigator.clipboard.writeText = async words => { copied.push(words); }")
    stops = browser.find_elements("css selector", ".dot[tabindex='0']")
    assert [dot.get_attribute("data-name") for dot in stops] == ["Ward, uniform from 1 (chosen)"]
    press(browser, ".dot.winner", "ARROW_LEFT")
    assert "prune: random" in text(browser, "#tip") and "drift 0.50000 ± 0.05000" in text(browser, "#tip")
    press(browser, ".dot:focus", "ARROW_RIGHT")
    shown = text(browser, "#tip")
    assert (
        "held out 0.02000, 60.0% of the multiply-accumulates, measured speed-up 1.50x [1.40, 1.60]" in shown
        and '"ward"' in shown
    )
    press(browser, ".dot:focus", "ENTER")
    copied = browser.execute_script("return copied")
    assert [Schedule.of(words) for words in copied] == [search_result().schedule]
    assert text(browser, "#said") == "The schedule of Ward, uniform from 1 is copied."
    press(browser, ".dot:focus", "ESCAPE")
    assert not browser.find_element("css selector", "#tip").is_displayed()


def test_points_by_pointer_method_and_half(pages: Path, browser: Any) -> None:
    from selenium.webdriver import ActionChains

    looks_like(browser, 1280, "light")
    browser.get((pages / "search.html").as_uri())
    ActionChains(browser).move_to_element(browser.find_element("css selector", ".dot.winner")).perform()
    assert "Ward, uniform from 1 (chosen)" in text(browser, "#tip")
    before = dots(browser)
    browser.find_element("css selector", "[value=held]").click()
    assert list(dots(browser)) == ["prune: shift, uniform from 1", "Ward, uniform from 1 (chosen)"]
    assert dots(browser)["Ward, uniform from 1 (chosen)"][1] < before["Ward, uniform from 1 (chosen)"][1]
    browser.find_element("css selector", "[name=method][value='1']").click()
    assert list(dots(browser)) == ["Ward, uniform from 1 (chosen)"]
    assert len(browser.find_elements("css selector", ".dot[tabindex='0']")) == 1


def test_ticks_of_an_axis_are_round_and_on_it() -> None:
    assert Axis.around([0.013, 0.4], log=True).ticks() == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5][1:5])
    assert Axis.around([0.5, 0.68]).ticks() == pytest.approx([0.5, 0.55, 0.6, 0.65])
    # candidates that all come close to the target, or drift alike
    assert Axis.around([0.6967, 0.7003]).ticks() == pytest.approx([0.697, 0.698, 0.699, 0.7])
    assert Axis.around([0.012, 0.018], log=True).ticks() == pytest.approx([0.012, 0.014, 0.016, 0.018])
    assert Axis.around([0.6]).at(0.6) == 50 and Axis.around([1e-9, 1.0], log=True).ticks()[0] == pytest.approx(1e-9)


def test_colours_are_viridis() -> None:
    shades = [tuple(int(text[i : i + 2], 16) for i in (1, 3, 5)) for text in VIRIDIS]
    wanted = matplotlib.colormaps["viridis"](np.linspace(0, 1, len(VIRIDIS)))[:, :3] * 255
    assert np.abs(np.array(shades) - wanted).max() <= 1
    between = (np.array(shades)[1:] + np.array(shades)[:-1]) / 2
    middle = (
        matplotlib.colormaps["viridis"](np.linspace(0.5, len(between) - 0.5, len(between)) / len(between))[:, :3] * 255
    )
    assert np.abs(between - middle).max() < 6  # drawn on straight lines from one to the next


def test_a_name_that_nothing_fills_is_an_error_and_so_is_a_file_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="'report' is undefined"):
        render("report.html")
    with pytest.raises(CompileError, match="No such file or directory; no page was written"):
        REPORT.to_html(tmp_path / "no" / "o.html")
    with pytest.raises(CompileError, match=r"--html .*o.png: a page ends in .html; name the file so"):
        check_page(tmp_path / "o.png", "--html")
    with pytest.raises(CompileError, match="give one in a directory that exists"):
        check_page(tmp_path / "no" / "o.html", "--html")


def test_the_commands_write_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = ["bench", "test_vit", "--schedule", "0:0.5", "--backend", "eager", "--batch-size", "1", "--rounds", "1"]
    assert main([*bench, "--html", str(tmp_path / "o.html")]) == 0
    page = (tmp_path / "o.html").read_text(encoding="utf-8")
    assert "<h1>test_<wbr>vit</h1>" in page and "Batch 1" in page and 'id="blocks"' in page
    assert main([*bench, "--html", str(tmp_path / "o.png")]) == 2
    assert "a page ends in .html; name the file so" in capsys.readouterr().err
    asked = argparse.Namespace(
        speedup=None, macs=0.5, drift=None, output=None, plot=None, html=tmp_path / "no" / "o.html"
    )
    with pytest.raises(CompileError, match="give one in a directory that exists"):
        command.run(torch.nn.Identity(), asked)


def test_a_report_without_blocks_is_a_page_too(tmp_path: Path) -> None:
    empty = replace(REPORT, blocks=(), skips=(), macs=0, macs_dense=0, flops=0)
    empty.to_html(tmp_path / "o.html")
    assert "Nothing was skipped." in (tmp_path / "o.html").read_text(encoding="utf-8")
