"""Dense and pruned models in every runtime that `rs_compile.export` writes for, side by side.

For each runtime and precision the same exporter writes the models, and they run in turns. "of MACs" is the speed-up
over the multiply-accumulates that it should come to. The cut model is the dense one with the first tokens kept, as many
as the schedule leaves: nothing is scored or gathered, so what it lacks of its multiply-accumulates no choice of tokens
could have saved. "of cut" is its time over the pruned model's. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from tabulate import tabulate
from torch import Tensor, nn

from bench.tables.options import chosen
from bench.tables.results import Results, Row, environment
from rs_compile import Report, Schedule, export, optimize, plan
from rs_compile.arguments import positive
from rs_compile.timing import interleaved

SCHEDULE, QUICK = Schedule({0: 0.8, 3: 0.8, 6: 0.8}), Schedule({0: 0.7, 1: 0.7})
MODELS = {"DeiT-S": "deit_small_patch16_224", "DINOv2-S": "vit_small_patch14_dinov2"}
PRECISIONS = {
    "torch.compile": ("fp32", "bf16"),
    "aot-inductor": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16"),
}

Call = Callable[[Tensor], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows, and go on from those in it")
    parser.add_argument("--quick", action="store_true", help="small stand-ins: does every row run?")
    parser.add_argument(
        "--models", type=chosen(tuple(MODELS)), default=list(MODELS), help=f"some of {','.join(MODELS)}"
    )
    listed = tuple(PRECISIONS)
    parser.add_argument("--runtimes", type=chosen(listed), default=list(listed), help=f"some of {','.join(listed)}")
    parser.add_argument("--precisions", type=chosen(("fp32", "bf16", "int8")), default=["fp32", "bf16", "int8"])
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=positive, default=7, help="of both in turns, medians are shown (default 7)")
    parser.add_argument("--threads", type=positive, help="CPU threads, torch's own choice if not given")


def run(args: argparse.Namespace) -> int:
    """Prints the table; a row a model, runtime, precision and batch."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    settings = {"quick": args.quick, "rounds": args.rounds, "versions": _versions()}
    results = Results(args.json, environment("runtimes", settings))
    for name in args.models:
        for runtime in args.runtimes:
            for precision in [p for p in PRECISIONS[runtime] if p in args.precisions]:
                cases: list[Row] = [
                    {"model": name, "runtime": runtime, "precision": precision, "batch": batch}
                    for batch in args.batch_size
                ]
                if results.lacking(cases, "dense ms"):
                    for case, values in zip(cases, _measured(name, cases, args.quick, args.rounds), strict=True):
                        results.fill(case, values)
    print(tabulate(results.rows, headers="keys", floatfmt=("", "", "", "", ".2f", ".2f", ".2f", ".2f", ".2f")))
    return 0


def _measured(name: str, cases: Sequence[Row], quick: bool, rounds: int) -> list[Row]:
    """Milliseconds of both models for each case of one runtime and precision."""
    runtime, precision = cases[0]["runtime"], cases[0]["precision"]
    dtype = torch.bfloat16 if precision == "bf16" and runtime != "openvino" else torch.float32
    model = built(name, quick).to(dtype)
    images = torch.randn(
        max(case["batch"] for case in cases), *_size(quick), generator=torch.Generator().manual_seed(0)
    ).to(dtype)
    schedule = QUICK if quick else SCHEDULE
    report = plan(model, schedule, images[:2])
    ratio = report.macs_dense / report.macs
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        make = partial(caller, runtime, precision, Path(folder), images[:2])
        calls = {
            "dense": make("dense", model, Schedule()),
            "cut": make("cut", cut(model, report), Schedule()),
            "pruned": make("pruned", model, schedule),
        }
        for case in cases:
            batch = images[: case["batch"]]
            timing = interleaved({name: partial(call, batch) for name, call in calls.items()}, rounds)
            speed_up = timing.ratio("dense", "pruned").median
            rows.append(
                {f"{name} ms": 1e3 * timing.of(name).median for name in calls}
                | {"speed-up": speed_up, "MACs": ratio, "of MACs": speed_up / ratio}
                | {"of cut": timing.ratio("cut", "pruned").median}
            )
    return rows


def built(name: str, quick: bool) -> nn.Module:
    """A model of `MODELS`; in a quick run few blocks on small images."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"depth": 3, "embed_dim": 48, "num_heads": 3} if quick else {}
    return timm.create_model(MODELS[name], img_size=_size(quick)[-1], **small).eval()


def _size(quick: bool) -> tuple[int, int, int]:
    return (3, 112, 112) if quick else (3, 224, 224)


def cut(model: nn.Module, report: Report) -> nn.Module:
    """The model with as many tokens behind each block as the report says, the first ones."""
    model = copy.deepcopy(model)
    for row in report.blocks:
        if row.tokens_out != row.tokens_in:
            block = model.get_submodule(row.where)
            block.register_forward_hook(lambda _, given, tokens, left=row.tokens_out: tokens[:, :left])
    return model


def caller(
    runtime: str, precision: str, folder: Path, example: Tensor, name: str, model: nn.Module, schedule: Schedule
) -> Call:
    """A model in a runtime, called with images; `name`, its file's, says whether it is the dense one."""
    if runtime == "torch.compile" and name == "dense":
        return torch.compile(model)
    # unread tokens are computed by the dense model alone
    backend = "inductor" if runtime == "torch.compile" else "eager"
    fast = optimize(model, schedule, backend=backend, drop_unread=name != "dense")
    if runtime == "torch.compile":
        return fast
    path = folder / name
    if runtime == "aot-inductor":
        export(fast, example, path.with_suffix(".pt2"), format="aot-inductor")
        return torch._inductor.aoti_load_package(str(path.with_suffix(".pt2")))
    if runtime == "onnxruntime":
        export(fast, example, path.with_suffix(".onnx"))
        return _onnx(path.with_suffix(".onnx"), precision)
    export(fast, example, path.with_suffix(".xml"))
    return _openvino(path.with_suffix(".xml"), precision)


def _onnx(path: Path, precision: str) -> Call:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if precision == "int8":
        whole, path = path, path.with_name(f"int8-{path.name}")
        # not Attention: the quantizer takes ONNX's op for its own of that name, and the model does not load
        layers = ["MatMul", "Gemm", "Conv"]
        quantize_dynamic(whole, path, weight_type=QuantType.QInt8, op_types_to_quantize=layers)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # else its threads wait busily while the next model's turn is timed
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})


def _openvino(path: Path, precision: str) -> Call:
    import openvino

    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    model = openvino.Core().compile_model(str(path), "CPU", hints)
    return lambda images: model(images.numpy())


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("onnxruntime", "openvino")}
