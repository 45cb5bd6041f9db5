"""Whether the hub of weights answers is asked once, in seconds."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from rs_compile import hub
from rs_compile.models import ModelError, build


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_a_hub_that_answers_and_one_that_does_not(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert hub.reachable()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.reachable()


def test_a_proxy_is_asked_in_the_hubs_place(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    assert not hub.reachable()
    monkeypatch.setenv("https_proxy", f"127.0.0.1:{port}")
    assert hub.reachable()


def test_offline_weights_that_no_cache_has_are_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:9")  # the port of "discard", which nobody opens
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.perf_counter()
    with pytest.raises(
        ModelError, match=r"the hub cannot be reached, and its cache has none .RSC-803.\n  way out: connect to"
    ):
        build("test_vit", pretrained=True)
    assert time.perf_counter() - started < 10 and not constants.HF_HUB_OFFLINE
