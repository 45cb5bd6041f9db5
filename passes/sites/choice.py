"""Checks of what users write into a schedule's values."""

from __future__ import annotations

from typing import Any

from passes.graph.base import ScheduleError


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuses a word that is none of `allowed`."""
    if value not in allowed:
        raise ScheduleError(f"unknown {name} {value!r}; write one of {', '.join(map(repr, allowed))}")


def check_flag(name: str, value: Any) -> None:
    """Refuses what is no bool: 1 and None are more often a slip than meant."""
    if not isinstance(value, bool):
        raise ScheduleError(f"{name} is {value!r}; write True or False")
