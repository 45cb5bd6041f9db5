"""What `rs-compile doctor` says of a machine, with parts of it taken away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rs_compile import doctor, hub


def by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {f.what: f for f in findings}


def test_versions_and_processor() -> None:
    found = by_name(doctor._versions() + doctor._processor())
    assert f"torch {torch.__version__.partition('+')[0]}" in found["packages"].found
    assert f"torch uses {torch.get_num_threads()}" in found["processor"].found


def test_few_threads_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert "of 64 cores; unset OMP_NUM_THREADS" in by_name(doctor._processor())["processor"].advice


def test_attention_is_flash_on_a_cpu_unless_it_is_switched_off() -> None:
    assert by_name(doctor._attention())["attention, cpu, float32"] == doctor.Finding("attention, cpu, float32", "flash")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "another kernel" in by_name(doctor._attention())["attention, cpu, float32"].advice


def test_without_a_compiler() -> None:
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        (only,) = doctor._compiler()
    assert only.found.startswith("none") and "apt-get install g++" in only.advice and "--backend eager" in only.advice


def test_the_cache_and_what_is_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernel.so").write_bytes(bytes(3 * 2**20))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (found,) = doctor._cache()
    assert f"{tmp_path}, 3 MB" in found.found and "emptied" not in found.advice
    monkeypatch.setattr(doctor, "LEAST_FREE", 2**70)
    assert "GB are free" in doctor._cache()[0].advice


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    (found,) = doctor._hub()
    assert "does not answer" in found.found and "--checkpoint FILE" in found.advice


def test_the_text_has_advice_below_the_table_and_json_all_of_it() -> None:
    fine, slow = doctor.Finding("a", "here"), doctor.Finding("b", "old", "get a new one")
    assert str(doctor.Diagnosis((fine,))).endswith("nothing is missing, and nothing known to be slow")
    both = doctor.Diagnosis((fine, slow))
    assert str(both).splitlines() == ["a  here", "b  old", "", "what is missing, or slow here:", "- b: get a new one"]
    assert json.loads(both.to_json())["findings"][1] == {"what": "b", "found": "old", "advice": "get a new one"}
