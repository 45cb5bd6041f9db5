"""What all tests share: two threads, hypothesis profiles, and the skip of CUDA tests without CUDA."""

from __future__ import annotations

import os
from typing import Any

import hypothesis
import pytest
import torch

torch.set_num_threads(2)

# an example exports a model: no deadline, and no database left in the working tree
_COMMON: dict[str, Any] = {
    "deadline": None,
    "max_examples": 25,
    "database": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much],
}
hypothesis.settings.register_profile("ci", derandomize=True, **_COMMON)
hypothesis.settings.register_profile("explore", derandomize=False, **{**_COMMON, "max_examples": 200})
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
