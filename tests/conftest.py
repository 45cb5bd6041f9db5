"""What all tests share: one thread, hypothesis profiles, and the skip of CUDA tests without CUDA."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import hypothesis
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from passes.graph.base import PassResult
from rs_compile import OptimizedModel
from rs_compile.compiling import copied
from rs_compile.signature import Call

# pytest listens to loggers that do not propagate, and torch then writes out each graph that it traces
_trace = logging.getLogger("torch.__trace")
_trace.handlers.clear()
_trace.propagate = True

torch.set_num_threads(1)  # the models are tiny; `pytest -n` uses the other cores better

# an example exports a model: no deadline, and no database left in the working tree
_COMMON: dict[str, Any] = {
    "deadline": None,
    "max_examples": 10,
    "database": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much],
}
# without shrinking, which takes minutes here: a config is readable as it is
hypothesis.settings.register_profile(
    "ci", derandomize=True, phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate), **_COMMON
)
hypothesis.settings.register_profile("explore", derandomize=False, **{**_COMMON, "max_examples": 200})
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_finish() -> None:
    gc.freeze()  # half a million objects of torch and others, which each collection would go through


@pytest.fixture(scope="module")
def captured_once() -> Iterator[None]:
    """Handles of one model share its capture, most of a small test's time, where a second call of one would as well."""
    captured: WeakKeyDictionary[torch.nn.Module, dict[Any, PassResult]] = WeakKeyDictionary()
    capture = OptimizedModel._prepare

    def prepare(handle: OptimizedModel, call: Call, verify: bool = False) -> PassResult:
        if handle._entry is not handle._model:
            return capture(handle, call, verify)
        found = captured.setdefault(handle._model, {})
        case = (*call.key, handle._lowers, handle._fixed_batch, verify)
        if (handle._state(), *case) not in found:
            prepared = capture(handle, call, verify)
            found[(handle._state(), *case)] = prepared  # what the capture left on the model is no change of it
        return copied(found[(handle._state(), *case)])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(OptimizedModel, "_prepare", prepare)
        yield


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_of_captures() -> Iterator[None]:
    """torch's caches hold the symbols of past captures: a million objects at the end of the suite."""
    yield
    FakeTensorMode.cache_clear()
    for function in vars(ShapeEnv).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
