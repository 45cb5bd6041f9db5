"""`torch.compile(model, backend="rs_compile", options={"schedule": ...})`: Dynamo's graph through the same pipeline."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.traceback import preserve_node_meta

from passes.graph.base import CompileError, PassResult, Refusal, ScheduleError
from passes.graph.codes import Code
from passes.network.branches import blocks_of, find_branches
from passes.network.stages import find_stages
from rs_compile.compiling import Graphs
from rs_compile.optimize import OptimizedModel, optimize
from rs_compile.schedule import Schedule
from rs_compile.signature import Call

_TORCH, _HERE = (str(Path(file).parent) for file in (torch.__file__, __file__))

# of optimize's arguments: what Dynamo's graph has no names for, or would change what it gives back
_OF_THE_MODEL = ("method", "outputs", "constant_inputs", "token_outputs")
_OPTIONS = sorted(set(inspect.signature(optimize).parameters) - {"model", *_OF_THE_MODEL})


def backend(gm: GraphModule, example_inputs: Sequence[Any], **told: Any) -> Callable[..., Any]:
    """The backend "rs_compile" of `torch.compile`, found by its entry point.

    A graph without blocks is compiled as it is. The schedule counts blocks in one graph, so the model must be one where
    tokens leave.

    Args:
        gm: Dynamo's graph, parameters lifted to inputs or not.
        example_inputs: of the call at hand.
        told: `mode`, and `options`: a dict of `schedule` and of what `optimize` takes beside it.

    Raises:
        ScheduleError: `options` has no schedule, or one that cannot mean anything.
        TypeError, ValueError: another option cannot. What `OptimizedModel.forward` raises, the first call raises.
    """
    options = dict(told.pop("options", {}))
    options |= told
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise ValueError(
            f"options names {', '.join(unknown)}; write some of {', '.join(_OPTIONS)}, or call "
            "rs_compile.optimize(model, schedule), which takes what concerns the whole model"
        )
    if "schedule" not in options:
        raise ScheduleError('torch.compile was told no schedule; write options={"schedule": {0: 0.8, 3: 0.8, 6: 0.8}}')
    held = [_is_weight(node, given) for node, given in zip(_inputs(gm), example_inputs, strict=True)]
    model = DynamoGraph(gm, held, _cut(gm))
    optimized = optimize(model, options.pop("schedule"), **options)
    handle = _OneGraph(model, optimized._options)

    def run(*given: Any) -> Any:
        return handle(*model.bind(given))

    return run


class DynamoGraph(nn.Module):
    """A graph of Dynamo's with its weights as parameters and buffers; called with the other inputs.

    Sizes of tensors that Dynamo passes as integers are read from the tensors, so that the number of samples may stay
    open and no other size does.

    Args:
        graph: Dynamo's.
        held: which of its inputs are weights.
        cut: why there may be more of the model than this graph; "" where there is not.
    """

    graph: GraphModule

    def __init__(self, graph: GraphModule, held: Sequence[bool], cut: str = "") -> None:
        super().__init__()
        self.__dict__["graph"] = graph  # not a child: its weights are not to be found twice
        for table in ("_parameters", "_buffers", "_modules"):  # of a graph whose weights are not lifted
            self.__dict__[table] = dict(graph.__dict__[table])
        self.training = _trains(graph)
        self.nodes = _inputs(graph)
        self.held = tuple(held)
        self.sizes = _sizes(self.nodes)
        self.cut = cut

    def bind(self, given: Sequence[Any]) -> list[Any]:
        """Takes the weights out of the inputs of a call, and gives back the others: tensors, and Python numbers."""
        rest = []
        for i, (node, held, value) in enumerate(zip(self.nodes, self.held, given, strict=True)):
            if held:
                table = self._parameters if isinstance(value, nn.Parameter) else self._buffers
                if table.get(node.name) is not value:
                    table[node.name] = value
            elif i not in self.sizes:
                rest.append(value.item() if _is_number(node, value) else value)
        return rest

    def forward(self, *given: Any) -> Any:
        """Dynamo's flat outputs, given what `bind` left."""
        rest = iter(given)
        inputs: list[Any] = [
            getattr(self, node.name) if held else None if i in self.sizes else next(rest)
            for i, (node, held) in enumerate(zip(self.nodes, self.held, strict=True))
        ]
        for i, (of, dim) in self.sizes.items():
            inputs[i] = inputs[of].shape[dim]
        with preserve_node_meta():  # or refusals would name no line of the model
            return _Run(self.graph).run(*inputs)


class _Run(Interpreter):
    """Runs Dynamo's graph; a number that Dynamo passes as a tensor is one already."""

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == "item" and not isinstance(args[0], Tensor):
            return args[0]
        return super().call_method(target, args, kwargs)


class _OneGraph(OptimizedModel):
    """One graph of a model: without blocks nothing leaves it, and behind a graph break no tokens may."""

    @property
    def _fixed_batch(self) -> bool:
        model: DynamoGraph = self._model
        values = [n.meta.get("example_value") for n, held in zip(model.nodes, model.held, strict=True) if not held]
        first = next((val for val in values if isinstance(val, Tensor) and val.dim()), None)
        return first is not None and isinstance(first.shape[0], int)

    def _rewrite(self, call: Call, prepared: PassResult, verify: bool) -> Graphs:
        model: DynamoGraph = self._model
        schedule: Schedule = self._options.schedule
        if not blocks_of(find_branches(prepared.gm)) and not find_stages(prepared.gm):
            self.__dict__["_options"] = replace(self._options, schedule=Schedule())
            return super()._rewrite(call, prepared, verify)
        if not model.cut or not schedule.prunes:
            return super()._rewrite(call, prepared, verify)
        # short outputs are those that would carry fewer tokens into the next graph
        self.__dict__["_options"] = replace(self._options, token_outputs="compact")
        try:
            graphs = super()._rewrite(call, prepared, verify)
        except CompileError as error:
            raise _in_parts(model.cut, f"a schedule counts the blocks of the whole; in this part: {error}") from error
        if graphs.kept:
            raise _in_parts(model.cut, "what leaves in this one would be missing in the next")
        return graphs


def _in_parts(cut: str, why: str) -> Refusal:
    return Refusal(
        f"torch.compile gives the model in parts, since {cut}, and {why}",
        None,
        "rs_compile.optimize(model, schedule), which captures the model as one graph; or mend the graph break, which "
        "torch.compile(..., fullgraph=True) shows",
        code=Code.SURROUNDED,
    )


def _cut(gm: GraphModule) -> str:
    """Why a graph may be a part of the model, "" where it is the whole: a graph break ends it, or it is compiled inside
    of code that Dynamo leaves as it is."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        said = next(iter(str(reason.reason).strip().splitlines()), "")
        at = reason.user_stack[-1] if reason.user_stack else None
        return f"the graph breaks{f' at {at.filename}:{at.lineno}' if at is not None else ''} ({said})"
    compiled = getattr(InstructionTranslator.current_tx(), "f_code", None)
    frame: FrameType | None = sys._getframe(1)
    outside: list[FrameType] = []
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        if frame.f_code is not compiled and not frame.f_code.co_filename.startswith((_TORCH, _HERE, "<")):
            outside.append(frame)
        frame = frame.f_back
    if frame is None or not outside:  # called by another than torch.compile, or the first thing that it compiles
        return ""
    code = outside[-1].f_code
    return f"{code.co_name} at {code.co_filename}:{outside[-1].f_lineno} is not in one graph"


def _inputs(gm: GraphModule) -> list[Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def _is_weight(node: Node, given: Any) -> bool:
    told: Mapping[str, Any] = node.meta.get("tensor_dict") or {}
    return isinstance(given, nn.Parameter) or "_dynamo_static_input_type" in told


def _is_number(node: Node, given: Any) -> bool:
    """Whether an input is a Python number, which Dynamo passes as a tensor."""
    read = [user.op == "call_method" and user.target == "item" for user in node.users]
    return isinstance(given, Tensor) and given.dim() == 0 and given.device.type == "cpu" and bool(read) and all(read)


def _sizes(nodes: Sequence[Node]) -> dict[int, tuple[int, int]]:
    """Which inputs are sizes, each with the tensor input and the dimension that has it."""
    shapes: dict[Any, tuple[int, int]] = {}
    for i, node in enumerate(nodes):
        val = node.meta.get("example_value")
        for dim, size in enumerate(val.shape if isinstance(val, Tensor) else ()):
            if isinstance(size, torch.SymInt):
                shapes.setdefault(size.node.expr, (i, dim))
    found = {}
    for i, node in enumerate(nodes):
        val = node.meta.get("example_value")
        if isinstance(val, torch.SymInt) and val.node.expr in shapes:
            found[i] = shapes[val.node.expr]
    return found


def _trains(gm: GraphModule) -> bool:
    """Whether an op of the graph was called as in train mode."""
    return any(_told_to_train(node) for node in gm.graph.nodes)


def _told_to_train(node: Node) -> bool:
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(str(node.target)) if node.graph.owning_module else None
        return module is not None and module.training
    if node.op != "call_function":
        return False
    target: Any = node.target
    try:
        bound = inspect.signature(target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # of a built-in function nothing is known
        return False
    return bound.get("training") is True
