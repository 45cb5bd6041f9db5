"""Pages in a headless Chromium; a test that asks for it is skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

AXE = "axe_core_python"  # its axe.min.js: the rules of accessibility that a machine can check


@contextmanager
def chromium() -> Iterator[Any]:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, Service(driver))
    yield chrome
    chrome.quit()


def looks_like(chrome: Any, width: int, scheme: str) -> None:
    """A window of that width, of a user who prefers "dark" or "light"."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def faults(chrome: Any) -> list[str]:
    """What axe finds against: contrast, names, landmarks, headings, tables, focus."""
    import axe_core_python

    chrome.execute_script(Path(axe_core_python.__file__).with_name("axe.min.js").read_text(encoding="utf-8"))
    found = chrome.execute_async_script("axe.run().then(arguments[0])")
    assert len(found["passes"]) > 10
    return [f"{v['id']}: {[node['html'][:80] for node in v['nodes'][:3]]}" for v in found["violations"]]


def logged(chrome: Any) -> list[str]:
    return [entry["message"] for entry in chrome.get_log("browser") if entry["source"] != "rendering"]


def text(chrome: Any, selector: str, at: int = 0) -> str:
    return str(chrome.find_elements("css selector", selector)[at].text)


def press(chrome: Any, selector: str, key: str, at: int = 0) -> None:
    from selenium.webdriver.common.keys import Keys

    chrome.find_elements("css selector", selector)[at].send_keys(getattr(Keys, key))
