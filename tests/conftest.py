"""What all tests share: one thread, hypothesis profiles, and the skip of CUDA tests without CUDA."""

from __future__ import annotations

import logging
import os
from typing import Any

import hypothesis
import pytest
import torch

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
