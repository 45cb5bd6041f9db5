"""Rewritten models in other runtimes: the same tokens stay, and merge, there."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from runtimes import Encoder, encoder, far, images, run_executorch, run_onnx, run_openvino
from torch import Tensor, nn

import rs_compile
from passes.sites.select import keep_highest
from rs_compile import ClassAttention, ExportError, OptimizedModel, Schedule, ToMe, VidTLDR, Ward
from rs_compile.exporting.formats import onnx, openvino
from rs_compile.exporting.metadata import Info
from rs_compile.exporting.program import Exported

PRUNED = Schedule({0: 0.8, 1: 0.7})
SCHEDULES = {
    "pruned": PRUNED,
    "class attention": Schedule({0: 0.8}, score=ClassAttention()),
    "stream": Schedule(merge={0: 3, 1: 3}),
    "tome": Schedule(merge={0: 3, 1: 3}, by=ToMe()),
    "vid-tldr": Schedule(merge={0: 3}, by=VidTLDR()),
    "ward": Schedule(merge={0: 3, 1: 3}, by=Ward()),
}


Written = Callable[[str, str], tuple[OptimizedModel, Path, Info]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The encoder by a schedule, its file of an ending and what the file says; each is written once."""

    @cache
    def write(how: str, ending: str) -> tuple[OptimizedModel, Path, Info]:
        fast, path = rs_compile.optimize(encoder(), SCHEDULES[how], backend="eager"), tmp_path_factory.mktemp("files")
        return fast, path / f"m.{ending}", rs_compile.export(fast, images(2), path / f"m.{ending}")

    return write


@torch.no_grad()
@pytest.mark.parametrize(
    "how", [how if how in ("pruned", "ward") else pytest.param(how, marks=pytest.mark.slow) for how in SCHEDULES]
)
def test_onnx_runtime(written: Written, how: str) -> None:
    fast, path, said = written(how, "onnx")
    for batch in (1, 3):
        found, wanted = run_onnx(path, images(batch)), fast(images(batch))
        assert far(found["logits"], wanted["logits"]) < 1e-5
        assert far(found["tokens_0"], wanted["tokens"][0]) < 1e-5
    assert rs_compile.info(path) == said and said.content["format"] == "onnx"


def test_attention_stays_one_op(written: Written) -> None:
    import onnx as library

    ops = [node.op_type for node in library.load(written("pruned", "onnx")[1]).graph.node]
    assert ops.count("Attention") == 3 and "Softmax" not in ops


class Biased(Encoder):
    """Attention has a learned mask, as Swin's and BEiT's position biases are."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(2, 17, 17))
        for block in self.blocks:
            block.bias = self.bias


@pytest.mark.parametrize("ending", ["onnx", "xml"])
def test_a_learned_mask(tmp_path: Path, ending: str) -> None:
    """Without `no_grad` around it, as people call it: gradients must not decide which kernel is written down."""
    torch.manual_seed(0)
    fast, path = rs_compile.optimize(Biased().eval(), PRUNED, backend="eager"), tmp_path / f"m.{ending}"
    rs_compile.export(fast, images(2), path)
    run = run_onnx if ending == "onnx" else run_openvino
    with torch.no_grad():
        assert far(run(path, images(3))["logits"], fast(images(3))["logits"]) < 1e-4


class Keeps(nn.Module):
    """Positions of the six highest of nine scores, the first and the last protected."""

    def forward(self, scores: Tensor) -> Tensor:
        return keep_highest(scores, torch.arange(9) % 8 == 0, 6)


class Sorts(nn.Module):
    """Positions in a stable order, the highest first, and the lowest first."""

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        down = scores.sort(dim=1, descending=True, stable=True).indices
        return down, scores.sort(dim=1, stable=True).indices


TIES = torch.tensor(
    [
        [0.0, 0.0, -0.0, 0.0, 0.0, 0.0, -0.0, 0.0, 0.0],
        [0.0, 1.0, 2.0, 1.0, 1.0, 1.0, 3.0, 1.0, 1.0],
        [0.0, 1.0, 1.0 + 2**-23, 1.0, 1.0 - 2**-24, 1.0, 1e-45, 0.0, 1.0],
        [-5.0, math.nan, math.inf, 3e38, -math.inf, math.inf, -3e38, math.nan, 0.0],
        [-5.0, math.inf, math.nan, math.inf, math.inf, math.inf, 3.4e38, math.inf, 0.0],
    ]
)


@torch.no_grad()
@pytest.mark.parametrize("module", [Keeps(), Sorts()], ids=["keeps", "sorts"])
def test_ties_and_what_is_not_finite(tmp_path: Path, module: nn.Module) -> None:
    """In ONNX Runtime and in OpenVINO, all rows at once and one by one."""
    rows = TIES if isinstance(module, Keeps) else TIES[:3]  # what is sorted elsewhere is finite
    program = torch.export.export(module, (rows,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    names = ("a",) if isinstance(module, Keeps) else ("a", "b")
    report = rs_compile.plan(encoder(), {}, images(2))
    exported = Exported(program, report, 0, names)
    onnx(exported, tmp_path / "m.onnx", "")
    openvino(exported, tmp_path / "v.xml", "")
    for scores in (rows, *rows.split(1)):
        wanted = module(scores)
        wanted = (wanted,) if isinstance(wanted, Tensor) else wanted
        for run, file in ((run_onnx, "m.onnx"), (run_openvino, "v.xml")):
            found = run(tmp_path / file, scores)
            assert [found[name].tolist() for name in names] == [w.tolist() for w in wanted], run.__name__


@torch.no_grad()
@pytest.mark.parametrize("how", ["pruned", "ward"])
def test_openvino(written: Written, how: str) -> None:
    fast, path, said = written(how, "xml")
    for batch in (1, 3):
        assert far(run_openvino(path, images(batch))["logits"], fast(images(batch))["logits"]) < 1e-4
    assert rs_compile.info(path) == said
    assert sorted(p.name for p in path.parent.iterdir()) == ["m.bin", "m.xml"]


@torch.no_grad()
def test_openvino_with_half_weights(written: Written, tmp_path: Path) -> None:
    """Half of the bytes; values rounded to float16."""
    fast, path, _ = written("pruned", "xml")
    rs_compile.export(fast, images(2), tmp_path / "half.xml", half_weights=True)
    whole, half = path.with_suffix(".bin").stat().st_size, (tmp_path / "half.bin").stat().st_size
    assert half < 0.6 * whole
    difference = far(run_openvino(tmp_path / "half.xml", images(3))["logits"], fast(images(3))["logits"])
    assert 0 < difference < 2e-2


@torch.no_grad()
def test_executorch(tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="pip install executorch")
    fast, path = rs_compile.optimize(encoder(), PRUNED, backend="eager"), tmp_path / "m.pte"
    said = rs_compile.export(fast, images(3), path)
    for batch in (1, 3):
        assert far(run_executorch(path, images(batch))[0], fast(images(batch))["logits"]) < 1e-4
    assert rs_compile.info(path) == said
    merges = rs_compile.optimize(encoder(), SCHEDULES["stream"], backend="eager")
    with pytest.raises(ExportError, match="ExecuTorch failed: LookupError: its runtime has no kernel for aten::sort"):
        rs_compile.export(merges, images(3), path)
    assert rs_compile.info(path) == said


@pytest.mark.inductor
@torch.no_grad()
def test_aot_inductor(tmp_path: Path) -> None:
    fast, path = rs_compile.optimize(encoder(), PRUNED, backend="eager"), tmp_path / "m.pt2"
    said = rs_compile.export(fast, images(2), path, format="aot-inductor")
    loaded = torch._inductor.aoti_load_package(str(path))
    for batch in (1, 3):
        found, wanted = loaded(images(batch)), fast(images(batch))
        assert far(found["logits"], wanted["logits"]) < 1e-5
        assert far(found["tokens"][0], wanted["tokens"][0]) < 1e-5
    assert rs_compile.info(path) == said


@pytest.mark.slow
@pytest.mark.inductor
@torch.no_grad()
def test_aot_inductor_from_cpp(tmp_path: Path) -> None:
    """The package run by a program without Python, batch 1 and 3."""
    from torch.utils.cpp_extension import include_paths, library_paths

    fast, package, program = rs_compile.optimize(encoder(), PRUNED), tmp_path / "m.pt2", tmp_path / "loader"
    rs_compile.export(fast, images(2), package, format="aot-inductor")
    libraries = library_paths()
    subprocess.run(
        [
            *("g++", "-std=c++20", "-O0", str(Path(__file__).with_name("loader.cpp")), "-o", str(program)),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(f"-I{path}" for path in include_paths()),
            *(f"-L{path}" for path in libraries),
            *(f"-Wl,-rpath,{path}" for path in libraries),
            *("-ltorch", "-ltorch_cpu", "-lc10"),
        ],
        check=True,
    )
    for batch in (1, 3):
        x, out = tmp_path / "x.pt", tmp_path / "out.pt"
        x.write_bytes(torch._C._pickle_save(images(batch)))
        subprocess.run([program, package, x, out], check=True)
        assert far(torch._C._pickle_load_obj(out.read_bytes()), encoder_logits(batch)) < 1e-5


def encoder_logits(batch: int) -> Tensor:
    """What the pruned model gives, uncompiled."""
    logits: Tensor = rs_compile.optimize(encoder(), PRUNED, backend="eager")(images(batch))["logits"]
    return logits
