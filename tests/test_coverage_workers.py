"""Models in processes of their own: what a crash, a hang and a plain row cost."""

from __future__ import annotations

import os
import time

import torch
from torch import nn

from bench.coverage.check import BROKEN, REFUSED, Row
from bench.coverage.subject import Subject
from bench.coverage.workers import checked


def work(library: str, name: str, compiled: bool) -> Row:
    """By its name: what a model may do to its process."""
    if name == "dies":
        os._exit(3)
    if name == "hangs":
        time.sleep(600)
    return {"result": REFUSED, "detail": name, "compiled": compiled}


def subject(name: str) -> Subject:
    return Subject("timm", name, name, nn.Identity, torch.zeros)


def test_a_crash_and_a_hang_cost_their_own_rows_only() -> None:
    names = ["first", "dies", "second", "hangs", "third"]
    rows = {s.name: row for s, row in checked([subject(n) for n in names], {("timm", "third")}, 2, 5.0, work)}
    assert sorted(rows) == sorted(names)
    assert {n: rows[n]["result"] for n in names if rows[n]["result"] == BROKEN} == {"dies": BROKEN, "hangs": BROKEN}
    assert rows["dies"]["detail"].startswith("its process ended with 3")
    assert rows["hangs"]["detail"] == "takes more than 5 s"
    assert [rows[n]["compiled"] for n in ("first", "second", "third")] == [False, False, True]
    assert all(row["seconds"] >= 0 for row in rows.values())
