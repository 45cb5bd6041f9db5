"""One writer a format: torch.export's program into a file that its runtime loads."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from passes.graph.codes import Code
from rs_compile.exporting.errors import ExportError, refused
from rs_compile.exporting.metadata import KEY, WAY_OUT, add_to_archive
from rs_compile.exporting.program import Exported

Writer = Callable[[Exported, Path, str], None]

_OTHER = "another format takes more ops: .pt2 takes all; or give that op a decomposition"


def torch_export(exported: Exported, path: Path, text: str) -> None:
    """torch.export's program; torch.export.load reads it, and `.module()` runs it."""
    torch.export.save(exported.program, path, extra_files={KEY: text})


def aot_inductor(exported: Exported, path: Path, text: str) -> None:
    """Compiled by AOTInductor; torch._inductor.aoti_load_package and AOTIModelPackageLoader of C++ run it."""
    from torch._inductor import aoti_compile_and_package

    try:
        aoti_compile_and_package(exported.program, package_path=str(path))
    except Exception as error:
        raise refused("AOTInductor", error, exported.program, _OTHER) from error
    add_to_archive(path, text)


def onnx(exported: Exported, path: Path, text: str) -> None:
    """ONNX of opset 23, where attention is one op; weights above 2 GB beside it, in `FILE.data`.

    For OpenVINO write `.xml`: it reads ONNX's TopK without the order of equal values.
    """
    made = onnx_program(exported)
    made.model.metadata_props[KEY] = text
    made.save(str(path))


def openvino(exported: Exported, path: Path, text: str, half: bool = False) -> None:
    """OpenVINO's `.xml` and `.bin`, by way of ONNX.

    Args:
        half: weights as float16, which OpenVINO computes with as the device asks.
    """
    import openvino as ov

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "model.onnx"
        onnx_program(exported).save(str(made))
        try:
            model = ov.convert_model(str(made))
        except Exception as error:
            raise refused("OpenVINO", error, exported.program, _OTHER) from error
        _ties_in_order(model)
        model.set_rt_info(text, [KEY])
        ov.save_model(model, str(path), compress_to_fp16=half)


def _ties_in_order(model: Any) -> None:
    """Has TopK give the earlier of equal values first, as ONNX says and OpenVINO's reader of ONNX forgets."""
    from openvino import opset11

    for op in model.get_ops():
        if op.get_type_name() == "TopK":
            told = op.get_attributes()
            kind = told["index_element_type"]
            topk = opset11.topk(*op.input_values(), told["axis"], told["mode"], "value", kind, stable=True)
            for old, new in zip(op.outputs(), topk.outputs(), strict=True):
                old.replace(new)


def executorch(exported: Exported, path: Path, text: str) -> None:
    """ExecuTorch's program, what XNNPACK takes lowered to it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    try:
        program = _without_sorts(exported.program)
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods={KEY: text})
        made = edge.to_executorch()
    except Exception as error:
        raise refused("ExecuTorch", error, exported.program, _OTHER) from error
    used = {
        f"{op.name}.{op.overload}".rstrip(".") for p in made.executorch_program.execution_plan for op in p.operators
    }
    if missing := sorted(used - set(Runtime.get().operator_registry.operator_names)):
        lacks = LookupError(f"its runtime has no kernel for {', '.join(missing)}")
        raise refused("ExecuTorch", lacks, exported.program, _OTHER)
    with path.open("wb") as file:
        made.write_to_file(file)


def _without_sorts(program: ExportedProgram) -> ExportedProgram:
    """The same with kept positions sorted by topk: ExecuTorch's runtime has no sort. They differ, so none is a tie."""
    program = _own(program)
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.sort.default):
        values = node.args[0].meta["val"]
        dim = node.args[1] if len(node.args) > 1 else -1
        down = bool(node.args[2]) if len(node.args) > 2 else False
        if values.dtype is torch.int64:
            node.target = torch.ops.aten.topk.default
            node.args, node.kwargs = (node.args[0], int(values.shape[dim]), dim, down, True), {}
    program.graph_module.recompile()
    return program


def onnx_program(exported: Exported) -> Any:
    """torch.onnx's program, before it is saved."""
    import onnxscript

    op: Any = onnxscript.opset23

    def sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # of equal values the earlier comes first in TopK, so it is a stable sort
        count = op.Reshape(op.Gather(op.Shape(self), op.Constant(value_int=dim)), op.Constant(value_ints=[1]))
        return op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)

    program = _whole_masks(exported.program)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's, on its own code
            made: Any = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                opset_version=23,
                output_names=list(exported.outputs),
                custom_translation_table={torch.ops.aten.sort.stable: sort},
            )
    except Exception as error:
        raise refused("torch.onnx", error, exported.program, _OTHER) from error
    return made


def _whole_masks(program: ExportedProgram) -> ExportedProgram:
    """The same with attention masks that have a row for each query: runtimes do not take one row for all."""
    attention = torch.ops.aten.scaled_dot_product_attention.default
    program = _own(program)
    for node in program.graph.find_nodes(op="call_function", target=attention):
        mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
        query = node.args[0].meta["val"]
        if mask is None or mask.meta["val"].shape[-2] == query.shape[-2]:
            continue
        sizes = [-1] * mask.meta["val"].dim()
        sizes[-2] = int(query.shape[-2])
        with program.graph.inserting_before(node):
            whole = program.graph.call_function(torch.ops.aten.expand.default, (mask, sizes))
        whole.meta = {**mask.meta, "val": torch.ops.aten.expand.default(mask.meta["val"], sizes)}
        node.replace_input_with(mask, whole)
    program.graph_module.recompile()
    return program


def _own(program: ExportedProgram) -> ExportedProgram:
    """The same with a graph of its own, on the same parameters."""
    program = copy.copy(program)
    program._graph_module = copy.deepcopy(program.graph_module)
    return program


@dataclass(frozen=True)
class Format:
    """A format: its writer, the ending of its files, and the packages that write it."""

    write: Writer
    suffix: str
    packages: tuple[str, ...] = ()


FORMATS = {
    "torch.export": Format(torch_export, ".pt2"),
    "aot-inductor": Format(aot_inductor, ".pt2"),
    "onnx": Format(onnx, ".onnx", ("onnx", "onnxscript")),
    "openvino": Format(openvino, ".xml", ("onnx", "onnxscript", "openvino")),
    "executorch": Format(executorch, ".pte", ("executorch",)),
}


def format_of(path: Path, given: str | None) -> str:
    """The format asked for, or that of the file's ending.

    Raises:
        ExportError: there is none, it does not end so, or a package is missing.
    """
    from importlib.util import find_spec

    listed = ", ".join(f"{name} ({f.suffix})" for name, f in FORMATS.items())
    name = given or next((name for name, f in FORMATS.items() if f.suffix == path.suffix), None)
    if name not in FORMATS:
        raise ExportError(f"{given or path.name} is no format that can be written; write one of {listed}")
    found = FORMATS[name]
    if path.suffix != found.suffix:
        raise ExportError(f"a file of {name} ends in {found.suffix}, not {path.name}; or write another of {listed}")
    if missing := [p for p in found.packages if find_spec(p) is None]:
        raise ExportError(
            f"{name} is written by {', '.join(missing)}, which is not installed; {WAY_OUT}", code=Code.MISSING
        )
    return name
