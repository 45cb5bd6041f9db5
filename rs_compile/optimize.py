"""The front door: a module that stands in for the model and sees fewer tokens."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.attention_kernel import KernelChoice
from passes.base import CompileError, PassResult
from passes.capture import FIXED_BATCH, batched
from passes.grid_pipeline import cuttable
from passes.pipeline import Compiled, Progress, block_kernels, prepare, prunable
from passes.restore import KEPT, TokenOutput
from passes.stages import find_stages
from rs_compile.inductor import compile_graph
from rs_compile.report import BlockRow, Explanation, ExplanationRow, Report, StageExplanation, StageRow
from rs_compile.rewrite import merging_text, rewrite
from rs_compile.schedule import Schedule

_KEY_LENGTH = 3  # state, inputs, nesting; a graph with a fixed batch adds the batch
_AUTOCAST = ("cpu", "cuda")  # device types that have it

Backend = str | Callable[..., Any]
TokenOutputs = Literal["restore", "compact"]


class InputError(CompileError, TypeError):
    """The model was called with something that cannot be captured; says what was expected."""


@dataclass(frozen=True)
class Options:
    """How to rewrite and compile; see `optimize`."""

    schedule: Schedule
    backend: Backend
    mode: str | None
    token_outputs: TokenOutputs
    lower_attention: bool | None
    progress: Progress | None
    force_insert: bool
    explicit_attention: bool


@dataclass
class _Plan:
    """What one input signature was compiled to."""

    compiled: Compiled
    run: Callable[..., Any]
    signature: str
    out_spec: pytree.TreeSpec
    kept: list[int]
    fixed_batch: bool
    ran: bool = False


class OptimizedModel(nn.Module):
    """Stands in for a model: same signature, outputs, parameters and `state_dict`, fewer tokens inside.

    The first call with a new input signature (shapes but for the batch, dtypes, device, train or eval mode,
    autocast state) captures, rewrites and compiles; later ones reuse it.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__()
        # the model's own tables: state_dict, to and parameters see the model, under its own names
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[table] = model.__dict__[table]
        self.__dict__["_model"] = model
        self.__dict__["_options"] = options
        self.__dict__["_plans"] = {}
        self.__dict__["_last"] = None
        self.__dict__["_lock"] = threading.RLock()
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, on fewer tokens.

        Raises:
            InputError: no input is a tensor.
            CaptureError, Refusal: the model cannot be captured, or a rewrite cannot be proven right.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key: tuple[Any, ...] = (self._state_key(), _leaf_key(leaves), spec)
        plan: _Plan | None = self._plans.get(key)
        if plan is not None and plan.fixed_batch:
            key = (*key, _batch_sizes(leaves))
            plan = self._plans.get(key)
        if plan is None or not plan.ran:
            with self._lock:
                plan = self._plans.get(key) or self._rewrite(key, leaves, self._prepare(leaves, args, kwargs))
                outputs = plan.run(*leaves)
                plan.ran = True
        else:
            outputs = plan.run(*leaves)
        self.__dict__["_last"] = plan
        return _nested(plan, outputs)

    def report(self) -> Report:
        """What was found, rewritten and skipped for the input signature that was called last.

        Raises:
            CompileError: the model has not been called yet.
        """
        plan: _Plan | None = self._last
        if plan is None:
            raise CompileError("nothing is compiled before the first call; call the model once, then report()")
        c = plan.compiled
        rows = tuple(
            BlockRow(r.block.index, r.where, r.tokens_in, r.tokens_out, r.macs_dense, r.macs, *_kernel(r.kernel))
            for r in c.blocks
        )
        return Report(
            type(self._model).__name__,
            plan.signature,
            rows,
            c.dense.macs,
            c.cost.macs,
            c.dense.flops,
            c.cost.flops,
            c.skips,
            tuple(StageRow(r.stage.index, r.where, r.grid_in, r.grid_out, r.macs_dense, r.macs) for r in c.stages),
            merging_text(self._options.schedule, c.size_bias),
        )

    def graph_module(self) -> torch.fx.GraphModule:
        """The rewritten graph for the input signature that was called last, before `torch.compile`."""
        if self._last is None:
            raise CompileError("nothing is compiled before the first call; call the model once")
        gm: torch.fx.GraphModule = self._last.compiled.gm
        return gm

    def train(self, mode: bool = True) -> OptimizedModel:
        self._model.train(mode)
        self.training = mode
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_model" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_model"], name)

    def __reduce__(self) -> Any:
        return OptimizedModel, (self._model, self._options)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModel:
        return OptimizedModel(copy.deepcopy(self._model, memo), self._options)

    def _state_key(self) -> tuple[Any, ...]:
        """What a captured graph depends on besides the inputs."""
        parts: list[Any] = []
        for module in self._model.modules():
            parts.append(module.training)
            for table in (module._parameters, module._buffers):
                parts += [(id(t), t.dtype, t.device) for t in table.values() if t is not None]
        return (tuple(parts), tuple(_autocast().items()))

    def _say(self, text: str) -> None:
        options: Options = self._options
        if options.progress is not None:
            options.progress(text)

    @property
    def _lowers(self) -> bool:
        """Whether hand-written attention becomes scaled_dot_product_attention."""
        options: Options = self._options
        return options.schedule.prunes if options.lower_attention is None else options.lower_attention

    def _prepare(self, leaves: Sequence[Any], args: Any, kwargs: Any) -> PassResult:
        _check_inputs(self._model, leaves)
        # traced without autocast: it acts on the graph's ops when they run, as on the model's
        ambient = _autocast()
        with torch._C._DisableAutocast():
            return prepare(self._model, args, kwargs, self._lowers, ambient, self._say)

    def _rewrite(self, key: Any, leaves: Sequence[Any], prepared: PassResult) -> _Plan:
        options: Options = self._options
        schedule = options.schedule
        gm = prepared.gm
        with torch._C._DisableAutocast():
            out_spec, fixed = gm.meta["out_spec"], gm.meta[FIXED_BATCH]
            compiled = rewrite(
                gm, schedule, options.token_outputs == "compact", options.force_insert, options.explicit_attention
            )
        kept = sorted(compiled.gm.meta.get(KEPT, {}))
        run: Callable[..., Any] = compiled.gm
        if options.backend != "eager":
            self._say("compiling")
            run = compile_graph(compiled.gm, options.backend, options.mode)
        compiled = replace(compiled, skips=prepared.skips + compiled.skips)
        plan = _Plan(compiled, run, _signature(leaves), out_spec, kept, fixed)
        if fixed and len(key) == _KEY_LENGTH:
            self._plans[key] = plan  # says that the batch belongs into the key
            key = (*key, _batch_sizes(leaves))
        self._plans[key] = plan
        return plan


def optimize(
    model: nn.Module,
    schedule: Schedule | Mapping[int, float],
    *,
    backend: Backend = "inductor",
    mode: str | None = None,
    token_outputs: TokenOutputs = "restore",
    lower_attention: bool | None = None,
    progress: Progress | None = None,
    force_insert: bool = False,
    explicit_attention: bool = False,
) -> OptimizedModel:
    """A faster stand-in for `model`, which is never changed. Nothing is compiled before the first call.

    Args:
        model: a vision model with residual MLP branches; its parameters are shared, not copied.
        schedule: after which blocks which share of the tokens stays, `{0: 0.8, 3: 0.8}` or a `Schedule`.
        backend: whatever `torch.compile` takes, or "eager" for the rewritten graph uncompiled.
        mode: `torch.compile`'s mode.
        token_outputs: an output that carries tokens is given back at full length, each pruned token with the
            residual-stream value it left with ("restore"), or as a `TokenOutput` of the short sequence
            and the kept positions ("compact").
        lower_attention: whether hand-written attention becomes scaled_dot_product_attention. None: where the
            schedule prunes; with nothing to prune the result is then bit-equal to the model's.
        progress: called with a line of text at each stage of the first call, which takes seconds to a minute.
        force_insert: insert selection even where every token stays (for tests).
        explicit_attention: write out every attention as softmax(QK^T)V, as published baselines run; without it
            that is done only where a baseline's importance reads the attention map.

    Returns:
        A module with the model's signature, outputs, parameters and `state_dict`, and a `report()`.

    Raises:
        ScheduleError: the schedule cannot mean anything.
        TypeError, ValueError: another argument cannot.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize takes a torch.nn.Module, not {type(model).__name__}; pass the model itself")
    if isinstance(model, OptimizedModel):
        raise TypeError("the model is optimized already; optimize the original with the whole schedule")
    if token_outputs not in ("restore", "compact"):
        raise ValueError(f'token_outputs is {token_outputs!r}; write "restore" or "compact"')
    if not (isinstance(backend, str) or callable(backend)):
        raise TypeError(f'backend is {backend!r}; pass what torch.compile takes, or "eager"')
    options = Options(
        Schedule.of(schedule),
        backend,
        mode,
        token_outputs,
        lower_attention,
        progress,
        force_insert,
        explicit_attention,
    )
    return OptimizedModel(model, options)


def plan(
    model: nn.Module,
    schedule: Schedule | Mapping[int, float],
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    """What `optimize` would make of a model: captured and rewritten, nothing compiled, no forward pass.

    Model and inputs may be on the meta device, so that a large model's GFLOPs need neither memory nor time.

    Args:
        model, schedule: see `optimize`.
        example_inputs, example_kwargs: see `explain`.
        options: other arguments of `optimize`, except backend and mode.

    Raises:
        CaptureError, Refusal: the model cannot be captured, or a rewrite cannot be proven right.
    """
    handle = optimize(model, schedule, backend="eager", **options)
    return next(plans([handle], example_inputs, example_kwargs))


def plans(
    handles: Sequence[OptimizedModel], example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None
) -> Iterator[Report]:
    """`plan` for several handles of one model, which is captured once for all.

    Args:
        handles: of the same model, uncompiled (backend "eager").
        example_inputs, example_kwargs: see `explain`.

    Yields:
        The report of each, in order.
    """
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kwargs = dict(example_kwargs or {})
    leaves, spec = pytree.tree_flatten((args, kwargs))
    prepared: dict[bool, PassResult] = {}
    for handle in handles:
        key = (handle._state_key(), _leaf_key(leaves), spec)
        if handle._lowers not in prepared:
            prepared[handle._lowers] = handle._prepare(leaves, args, kwargs)
        handle.__dict__["_last"] = handle._rewrite(key, leaves, _copied(prepared[handle._lowers]))
        yield handle.report()


def explain(model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> Explanation:
    """What the matcher finds in a model, with nothing changed or compiled.

    Args:
        model: any module.
        example_inputs: a tensor [B, ...], or a tuple of the model's positional inputs.
        example_kwargs: its keyword inputs.

    Returns:
        A table of blocks: index, where, kind, tokens, attention kernel, and whether tokens can leave after it,
        or the reason why not.

    Raises:
        CaptureError: torch.export cannot capture the model.
    """
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kwargs = dict(example_kwargs or {})
    _check_inputs(model, pytree.tree_leaves((args, kwargs)))
    with torch._C._DisableAutocast():
        prepared = prepare(model, args, kwargs, lower=True)
    rows = []
    blocks, branches, choices = block_kernels(prepared.gm)
    for block in blocks:
        able, reason = prunable(prepared.gm, block, branches)
        kinds = [b.kind for b in (block.attention, block.mlp) if b is not None]
        shape = block.output.meta["val"].shape
        tokens = (
            int(shape[1])
            if len(shape) == 3 and isinstance(shape[1], int)
            else (int(shape[0]) if isinstance(shape[0], int) else None)
        )
        rows.append(
            ExplanationRow(
                block.index, block.where, " + ".join(kinds), tokens, *_kernel(choices.get(block.index)), able, reason
            )
        )
    stages = []
    for stage in find_stages(prepared.gm):
        able, reason = cuttable(stage)
        stages.append(StageExplanation(stage.index, stage.where, len(stage.blocks), stage.grid, able, reason))
    notes = []
    if not blocks and not stages:
        found = sorted({f"{b.kind} ({b.reason})" if b.reason else b.kind for b in branches})
        notes.append("no residual MLP branch found" + (f"; branches found: {', '.join(found[:4])}" if found else ""))
    return Explanation(type(model).__name__, tuple(rows), prepared.skips, tuple(notes), tuple(stages))


def _autocast() -> dict[str, torch.dtype]:
    """The autocast that is on now, its dtype by device type."""
    return {d: torch.get_autocast_dtype(d) for d in _AUTOCAST if torch.is_autocast_enabled(d)}


def _check_inputs(model: nn.Module, leaves: Sequence[Any]) -> None:
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        given = ", ".join(type(leaf).__name__ for leaf in leaves) or "nothing"
        raise InputError(f"{type(model).__name__} was called with {given}; pass tensors, [batch, ...]")


def _copied(prepared: PassResult) -> PassResult:
    """The same with a graph of its own, on the same parameters: passes write into the graph."""
    gm = torch.fx.GraphModule(prepared.gm, copy.deepcopy(prepared.gm.graph))
    gm.meta = dict(prepared.gm.meta)
    return PassResult(gm, skips=prepared.skips)


def _leaf_key(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """The input signature: everything but the number of samples."""
    runs = batched(leaves)
    return tuple(
        (leaf.shape[1:] if over else leaf.shape, leaf.stride()[1:], over, leaf.dtype, leaf.device)
        if isinstance(leaf, torch.Tensor)
        else repr(leaf)
        for leaf, over in zip(leaves, runs, strict=True)
    )


def _batch_sizes(leaves: Sequence[Any]) -> tuple[int, ...]:
    return tuple(leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim())


def _signature(leaves: Sequence[Any]) -> str:
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    runs = batched(tensors)
    texts = []
    for t, over in zip(tensors, runs, strict=True):
        sizes = ", ".join("B" if over and d == 0 else str(s) for d, s in enumerate(t.shape))
        texts.append(f"{str(t.dtype).removeprefix('torch.')}[{sizes}] on {t.device}")
    return ", ".join(texts)


def _kernel(choice: KernelChoice | None) -> tuple[str, str]:
    return (choice.name, "" if choice.name == "flash" else choice.reason) if choice is not None else ("", "")


def _nested(plan: _Plan, outputs: Any) -> Any:
    """The flat outputs as the model nests them; short token outputs with their kept positions."""
    count = plan.out_spec.num_leaves
    leaves = list(outputs[:count])
    for i, positions in zip(plan.kept, outputs[count:], strict=True):
        leaves[i] = TokenOutput(leaves[i], positions)
    return pytree.tree_unflatten(leaves, plan.out_spec)
