"""`python -m bench gpu`: rows, verdicts, what it refuses, and, slow, the runner and a whole rehearsal."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.gpu import runner
from bench.gpu.document import Table
from bench.gpu.journal import Journal, Outcome
from bench.gpu.plan import STEPS, TINY_STEPS, Setting, Step
from bench.gpu.profiled import Trace, by_attention, kind
from bench.gpu.rows import fill_row, fitting
from bench.gpu.runner import run_plan
from bench.gpu.throughput import printed_speed_up
from bench.gpu.verdict import by_size, in_words, winner
from bench.tables.methods import ATTENTION, BASE, OURS
from bench.tables.results import Results
from passes.graph.base import CompileError
from rs_compile.pages import render

CPU = Setting("cpu", tiny=True)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def ratio(low: float, median: float, high: float) -> dict[str, float]:
    return {"quartile_low": low, "median": median, "quartile_high": high}


def test_a_row_that_failed_is_kept_and_tried_again(tmp_path: Path) -> None:
    results, calls = Results(tmp_path / "rows.json", {}), []

    def make() -> dict[str, int]:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("first line\n\n  second line\nthird")
        return {"value": 7}

    assert not fill_row(results, {"row": "a"}, make)
    assert results.row({"row": "a"})["failed"] == "ValueError: first line second line"
    results = Results(tmp_path / "rows.json", {})  # another process
    assert fill_row(results, {"row": "a"}, make) and fill_row(results, {"row": "a"}, make)
    assert results.rows == [{"row": "a", "failed": "", "value": 7}] and len(calls) == 2


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling create")],
)
def test_a_batch_is_halved_until_it_fits(error: Exception) -> None:
    tried = []

    def run(batch: int) -> str:
        tried.append(batch)
        if batch > 3:
            raise error
        return "fits"

    assert fitting(12, run) == ("fits", 3) and tried == [12, 6, 3]


def test_other_errors_and_a_batch_of_one_are_not_halved() -> None:
    def never(batch: int) -> None:
        raise torch.OutOfMemoryError(f"no room for {batch}")

    def wrong(batch: int) -> None:
        raise ValueError("wrong shape")

    with pytest.raises(torch.OutOfMemoryError, match="no room for 1"):
        fitting(4, never)
    with pytest.raises(ValueError, match="wrong shape"):
        fitting(4, wrong)


def test_verdicts() -> None:
    assert winner("a", "b", ratio(1.1, 1.2, 1.3)) == "b"
    assert winner("a", "b", ratio(0.5, 0.6, 0.9)) == "a"
    assert winner("a", "b", ratio(0.95, 1.1, 1.2)) == winner("a", "b", ratio(1.005, 1.01, 1.015)) == ""
    assert in_words("a", "b", ratio(0.4, 0.5, 0.8)) == "a is faster, 2.00x [1.25, 2.50]"
    assert in_words("a", "b", ratio(0.9, 1.0, 1.1)).startswith("no difference")
    assert by_size("a", "b", [(700, "b"), (100, "a"), (400, "a")], "tokens") == (
        "a is faster up to 400 tokens, b from 700 on"
    )
    assert by_size("a", "b", [(100, "a"), (200, "b"), (300, "a")], "tokens").startswith("no clear border: a at 100")
    assert by_size("a", "b", [(100, ""), (200, "b")], "tokens").startswith("b is faster wherever")
    assert by_size("a", "b", [(100, "")], "tokens").startswith("neither")


def test_kernels_by_block() -> None:
    names = ["sm80_xmma_gemm_f16", "void pytorch_flash::flash_fwd_splitkv_kernel<>", "flash_fwd_splitkv_combine_kernel"]
    names += ["triton_per_fused__scaled_dot_product_flash_attention_1", "fmha_cutlassF_f16", "Memset", "nvjet_hsh_64"]
    assert [kind(name) for name in names] == [
        "product", "attention", "attention", "generated", "attention", "other", "product",
    ]  # fmt: skip
    assert by_attention(names) == [names[:3], names[3:5], names[5:]]


def test_a_trace_of_a_gpu_and_of_a_cpu() -> None:
    """A GPU's kernels in the order that they ran, no copies and no annotations; a CPU's outermost ops."""
    seen = [
        ("kernel", "flash_fwd_kernel", 30, 5),
        ("kernel", "triton_poi_fused_0", 20, 5),
        ("gpu_memcpy", "Memcpy HtoD", 10, 5),
        ("gpu_user_annotation", "## Call CompiledFxGraph ##", 10, 50),
        ("cpu_op", "aten::scaled_dot_product_attention", 1, 9),
        ("cpu_op", "aten::_scaled_dot_product_flash_attention", 2, 7),
        ("cpu_op", "aten::_scaled_dot_product_attention_math", 12, 3),
    ]
    events = [{"cat": cat, "name": name, "ts": ts, "dur": dur} for cat, name, ts, dur in seen]
    on_gpu, on_cpu = (Trace(events, torch.device(device)) for device in ("cuda", "cpu"))
    assert on_gpu.kernels == ["triton_poi_fused_0", "flash_fwd_kernel"]
    assert on_gpu.attentions == ["flash"] and on_gpu.attention_kernels == ["flash_fwd_kernel"]
    assert on_cpu.kernels == ["scaled_dot_product_attention", "_scaled_dot_product_attention_math"]


def test_the_papers_speed_ups() -> None:
    wanted = {("UMT-B", OURS): 5.47, ("UMT-L", OURS): 5.50, ("DeiT-S", OURS): 1.98, ("DeiT-S", ATTENTION): 1.61}
    assert {of: round(printed_speed_up(*of) or 0, 2) for of in wanted} == wanted
    assert printed_speed_up("DeiT-S", BASE) is None


def test_a_table_as_markdown_and_as_a_page() -> None:
    table = Table("A <b>", ("x", "y"), [["a|b", "<script>"]], ["x wins"], svg=["<svg/>"])
    assert "a\\|b" in table.markdown() and "**x wins**" in table.markdown()
    page = render("document.html", heading="All", notes=["one & two"], verdicts=table.verdicts, parts=[table])
    assert page.count("<script>") == 1 and ">&lt;script&gt;</td>" in page and "<svg/>" in page
    assert "<h2>A &lt;b&gt;</h2>" in page and "<p>one &amp; two</p>" in page and "<li>x wins</li>" in page


def test_what_a_bare_machine_lacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    absent = {"rich", "matplotlib"}
    monkeypatch.setattr("bench.gpu.packages.find_spec", lambda name: None if name in absent else found(name))
    assert main(["gpu", "--list-packages"]) == 0
    text = capsys.readouterr().out
    assert text.count("MISSING") == 2 and "pip install rich matplotlib" in text
    assert main(["gpu", "--tiny", "--device", "cpu"]) == 2
    assert "packages are missing: rich\n" in capsys.readouterr().err


def test_nothing_else_is_imported() -> None:
    """Everything that the plan imports comes with torch, triton or timm, or is listed."""
    code = f"""
import sys
from importlib import import_module
for name in {sorted({step.module for step in STEPS.values()} | {"bench.gpu.runner", "bench.gpu.step"})!r}:
    import_module(name)
import bench.gpu.pictures
print(*{{name.partition(".")[0] for name in sys.modules}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    heavy = {"transformers", "open_clip", "sklearn", "skimage", "av", "scipy", "fvcore", "hypothesis", "pytest", "peft"}
    assert loaded & heavy == set() and {"torch", "timm", "matplotlib"} <= loaded


@NO_GPU
def test_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--out", str(tmp_path)]) == 2
    assert "--tiny --device cpu" in capsys.readouterr().err
    assert main(["gpu", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "pass --tiny as well" in capsys.readouterr().err
    for options, words in ((["--minutes", "0"], "no number of minutes"), (["--only", "device,x"], "'x' is no step")):
        with pytest.raises(SystemExit):
            main(["gpu", *options])
        assert words in capsys.readouterr().err


def test_a_directory_of_other_results_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, CPU).note("device", Outcome("done"))
    assert Journal(tmp_path, CPU).outcomes == {"device": Outcome("done")}
    with pytest.raises(CompileError, match="give another --out"):
        Journal(tmp_path, Setting("cuda", False))
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(CompileError, match="no result of this command"):
        Journal(tmp_path, CPU)
    (tmp_path / "file").write_text("")
    with pytest.raises(CompileError, match="give a directory that can be made"):
        Journal(tmp_path / "file", CPU)


def test_never_run_before_out_of_time_before_failed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, CPU)
    steps = [Step(name, name, "", 1) for name in ("failed", "late", "done", "new", "stopped")]
    journal.note("failed", Outcome("failed"))
    journal.note("late", Outcome("out of time"))
    journal.note("done", Outcome("done"))
    journal.note("stopped", Outcome("stopped"))
    assert [step.name for step in journal.in_order(steps)] == ["new", "stopped", "late", "failed"]


def test_a_plan_without_time_says_so(tmp_path: Path) -> None:
    steps = list(TINY_STEPS.values())
    assert run_plan(steps, CPU, tmp_path, seconds=runner.LEAST / 2) == 0
    states = {o["state"] for o in read(tmp_path)["outcomes"].values()}
    assert states == {"not run"} and "no time was left" in (tmp_path / "RESULTS.md").read_text()


def read(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "results.json").read_text())
    return content


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_step_that_fails_waits_or_dies_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    steps = [Step(name, name, "gpu_plan_steps", 60, (name,)) for name in ("raises", "waits", "dies", "goes well")]
    assert run_plan(steps, CPU, tmp_path, seconds=3600) == 1
    content = read(tmp_path)
    outcomes = content["outcomes"]
    assert {name: o["state"] for name, o in outcomes.items()} == {
        "raises": "failed", "waits": "out of time", "dies": "failed", "goes well": "done",
    }  # fmt: skip
    assert outcomes["raises"]["reason"].startswith("ValueError: no such kernel and more; see ")
    assert "ended with -6" in outcomes["dies"]["reason"]
    assert not alive(content["rows"]["waits"][0]["pid"])
    # what each measured is there, and the second run adds to it, with all steps but the one that is done
    assert {name: len(rows) for name, rows in content["rows"].items()} == dict(zip(outcomes, (1, 1, 1, 2), strict=True))
    assert run_plan(steps, CPU, tmp_path, seconds=3600) == 0
    again = read(tmp_path)
    assert {o["state"] for o in again["outcomes"].values()} == {"done"}
    assert all(again["rows"][name][0] == content["rows"][name][0] for name in outcomes)
    assert again["outcomes"]["goes well"] == outcomes["goes well"]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_it_can_be_stopped_at_any_moment(sent: signal.Signals, tmp_path: Path) -> None:
    """By Ctrl-C it says so; killed, it leaves no step behind, and what was measured."""
    code = (
        "import sys; from pathlib import Path; from bench.gpu.plan import Setting, Step; "
        "from bench.gpu.runner import run_plan; step = Step('waits', '', 'gpu_plan_steps', 600, ('waits',)); "
        f"sys.exit(run_plan([step], Setting('cpu', True), Path({str(tmp_path)!r}), 3600))"
    )
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)]),
    }
    process = subprocess.Popen([sys.executable, "-c", code], env=environ, stderr=subprocess.DEVNULL)
    rows = tmp_path / "steps" / "waits.json"
    while not rows.exists():
        assert process.poll() is None
        time.sleep(0.2)
    step = json.loads(rows.read_text())["rows"][0]["pid"]
    process.send_signal(sent)
    code_of_end = process.wait(60)
    for _ in range(100):
        if not alive(step):
            break
        time.sleep(0.1)
    assert not alive(step)
    if sent is signal.SIGINT:
        assert code_of_end == 130 and read(tmp_path)["outcomes"]["waits"]["state"] == "stopped"
    assert [row["row"] for row in Results(rows, json.loads(rows.read_text())["environment"]).rows] == ["first"]


@pytest.mark.slow
def test_the_rehearsal(tmp_path: Path) -> None:
    """Every step runs on a CPU, or says why it cannot; a second run has nothing left to do."""
    command = ["gpu", "--tiny", "--device", "cpu", "--out", str(tmp_path), "--minutes", "60"]
    assert main(command) == 0
    content = read(tmp_path)
    assert list(content["outcomes"]) == list(STEPS)
    cannot = {name for name, step in STEPS.items() if step.needs_cuda}
    for name, outcome in content["outcomes"].items():
        assert outcome["state"] == ("cannot run" if name in cannot else "done"), (name, outcome)
        assert bool(content["rows"][name]) == (name not in cannot)
        assert name not in cannot or STEPS[name].needs_cuda == outcome["reason"]
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "RESULTS.md").read_text()
    assert page.count("<svg") == 4 and "src=" not in page and "<link" not in page
    for words in ("mean nothing", "the paper has 5.47x", "CUDA graphs are CUDA's", "size bias: "):
        assert words in page.replace("&#x27;", "'") and words in text
    assert main(command) == 0
    assert read(tmp_path)["rows"] == content["rows"]
