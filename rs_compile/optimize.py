"""The front door: a module that stands in for the model and sees fewer tokens."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from passes.capture.capture import FIRST_RUN, FIXED_BATCH, OUT_SPEC, batched, capture
from passes.cleanup.keep_outputs import KeepOutputs
from passes.graph.base import CompileError, PassResult, Skip
from passes.graph.codes import Code
from passes.graph.debug import watched as watched_passes
from passes.network.prunable import GUARDS
from passes.pipeline import Progress, cleaned
from passes.sites.select import MANY
from rs_compile.compiling import (
    Backend,
    Graphs,
    Options,
    Program,
    TokenOutputs,
    copied,
    make_program,
    nested,
    reported,
)
from rs_compile.entry import Entry, check_methods, public_method, watched
from rs_compile.errors import named
from rs_compile.faithful import check_faithful
from rs_compile.grid_faithful import check_cuts
from rs_compile.guard import Guard, hindrance
from rs_compile.outputs import checked, kept_leaves
from rs_compile.report import Report
from rs_compile.rewrite import merging_text, rewrite, unpruned
from rs_compile.schedule import Schedule
from rs_compile.side_by_side import SideBySide, side_by_side
from rs_compile.signature import Call, batch_sizes, check_inputs, in_words, many_samples
from rs_compile.state import State, StateReader, autocast_state
from rs_compile.surroundings import check_model, exporting, hooked_inside, not_exported, refuse_watchers
from rs_compile.traced import traced

# one capture at a time in the process: torch.export swaps a model's parameters for fake ones while it runs
_CAPTURING = threading.RLock()
_DEBUG = "rs_compile_debug"  # directory of RS_COMPILE_DEBUG=1
_BY_SIZE = "by size"  # in the place of a plan: this signature has one for each number of samples


class OptimizedModel(nn.Module):
    """Stands in for a model: same signature, outputs, parameters and `state_dict`, fewer tokens inside.

    The first call with a new input signature (shapes but for the batch, dtypes, device, train or eval mode,
    autocast state) captures, rewrites and compiles; later ones reuse it. What the signature has of the model, and which
    changes of it are seen, `StateReader` says.

    Parameters, buffers and submodules are the model's own, shared both ways: `half`, `to`, `train`, `requires_grad_`,
    `load_state_dict` on either act on both. Attributes that are set on the handle are its own.
    """

    def __init__(self, model: nn.Module, options: Options, entry: Entry | None = None) -> None:
        super().__init__()
        # the model's own tables: state_dict, to and parameters see the model, under its own names
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[table] = model.__dict__[table]
        self.__dict__["_model"] = model
        self.__dict__["_options"] = options
        self.__dict__["_plans"] = {}
        self.__dict__["_graphs"] = {}  # of signatures whose sizes have plans of their own
        self.__dict__["_last"] = None
        self.__dict__["_state"] = StateReader(model)
        self.__dict__["_entry"] = entry or model  # what is captured
        self.__dict__["_warned"] = set()
        self.training = model.training
        for name in options.methods if entry is None else ():
            self.__dict__[name] = handle = OptimizedModel(model, options, Entry(model, name))
            handle.__dict__["_front"] = self

    @torch._disable_dynamo(recursive=True)  # what it reads, and a capture, are no part of a graph around it
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, on fewer tokens.

        Raises:
            InputError: no input is a tensor.
            CaptureError, Refusal: the model does not run or cannot be captured, or a rewrite cannot be proven right.
            CompileError: whatever else the first call of a signature meets.
        """
        refuse_watchers()
        call = self._read(args, kwargs)
        if exporting():
            return self._followed(call)
        leaves = call.leaves
        plan = self._find(call)
        if plan is None:
            with _CAPTURING, named("optimize"):
                # the model's state may have been read while another thread was capturing
                plan, before = self._find(call), self._state()
                if plan is None:
                    verify = self._options.verify
                    plan = self._plan(call, lambda: self._prepare(call, verify), verify)
                outputs = plan.run(*leaves)
                self._keep(before, call, plan)
        else:
            outputs = plan.run(*leaves)
        self.__dict__["_last"] = plan
        if "_front" in self.__dict__:
            self._front.__dict__["_last"] = plan
        return nested(plan.graphs, outputs)

    def report(self) -> Report:
        """What was found, rewritten and skipped for the input signature that was called last.

        Raises:
            CompileError: the model has not been called yet.
        """
        plan: Program | None = self._last
        if plan is None:
            raise CompileError(
                "nothing is compiled before the first call; call the model once, then report()", code=Code.NOT_CALLED
            )
        return replace(plan.made.report, guard=plan.verdict)

    def graph_module(self) -> torch.fx.GraphModule:
        """The rewritten graph for the input signature that was called last, before `torch.compile`."""
        if self._last is None:
            raise CompileError("nothing is compiled before the first call; call the model once", code=Code.NOT_CALLED)
        gm: torch.fx.GraphModule = self._last.made.gm
        return gm

    def remeasure(self) -> None:
        """Forgets what `guard="measure"` kept: the next call of each size compiles and times both graphs again.

        Raises:
            CompileError: there is no guard.
        """
        if self._options.guard is None:
            raise CompileError(
                'nothing is measured without a guard; optimize(model, schedule, guard="measure") times both',
                code=Code.NOT_CALLED,
            )
        with _CAPTURING:
            self.__dict__["_plans"] = {
                key: plan
                for key, plan in self._plans.items()
                if plan is _BY_SIZE or plan.verdict is None or plan.verdict.dense_seconds is None
            }

    def compare(self, *args: Any, rounds: int = 7, **kwargs: Any) -> SideBySide:
        """How far each output is from the dense model's on these inputs, and the speed of both, timed in turns.

        Args:
            args: the model's inputs, [B, ...]; more samples say more.
            rounds: of timing, both sides in each.
            kwargs: its keyword inputs.

        Raises:
            CompileError: the model returns no tensor of floats, or cannot be rewritten.
        """
        options: Options = self._options
        return side_by_side(self._entry, self, args, kwargs, rounds, options.backend, self._say)

    def train(self, mode: bool = True) -> OptimizedModel:
        self._model.train(mode)
        self.training = mode
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_model" not in self.__dict__:
            raise AttributeError(name)
        model: nn.Module = self.__dict__["_model"]
        value = getattr(model, name)
        return watched(model, value, self.__dict__["_warned"]) if public_method(model, value) else value

    def __reduce__(self) -> Any:
        return OptimizedModel, (self._model, self._options)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModel:
        return OptimizedModel(copy.deepcopy(self._model, memo), self._options)

    def _say(self, text: str) -> None:
        options: Options = self._options
        if options.progress is not None:
            options.progress(text)

    @property
    def _fixed_batch(self) -> bool:
        """Whether the model is right for one number of samples only."""
        return False

    @property
    def _lowers(self) -> bool:
        """Whether hand-written attention becomes scaled_dot_product_attention."""
        options: Options = self._options
        return options.schedule.prunes if options.lower_attention is None else options.lower_attention

    def _read(self, args: Any, kwargs: Any) -> Call:
        return Call.of(self._entry, args, kwargs, self._options.constant_inputs)

    def _prepare(self, call: Call, verify: bool = False) -> PassResult:
        check_inputs(self._model, call.leaves)
        self._entry.training = self._model.training
        ambient = dict(autocast_state())
        self._say("capturing the model")
        gm = capture(self._entry, call.args, call.kwargs, call.constant, self._fixed_batch)
        first = FIRST_RUN.take(gm)
        MANY.put(gm, many_samples(call.leaves, batched(call.leaves, call.constant)))
        why = check_faithful(self._entry, gm, first, call.leaves, call.key[1]) if verify else ""
        with torch._C._DisableAutocast():
            prepared = cleaned(gm, self._lowers, ambient, self._say)
        notes: tuple[Skip, ...] = (_not_compared(f"with the model: {why}"),) if why else ()
        notes += hooked_inside(self._model)
        return replace(prepared, skips=notes + prepared.skips)

    def _rewrite(self, call: Call, prepared: PassResult, verify: bool) -> Graphs:
        options: Options = self._options
        schedule, gm = options.schedule, prepared.gm
        if options.outputs is not None:
            kept = kept_leaves(type(self._model).__name__, OUT_SPEC.of(gm), options.outputs)
            gm = KeepOutputs(frozenset(kept)).apply(gm).gm
            GUARDS.put(gm, {})  # what reads tokens is not what it was
        drop = schedule.prunes if options.drop_unread is None else options.drop_unread
        out_spec, fixed = OUT_SPEC.of(gm), bool(FIXED_BATCH.of(gm))
        name, inputs = type(self._model).__name__, in_words(call.leaves, call.constant)
        dense, unmeasured = None, ""
        with torch._C._DisableAutocast():
            if options.guard is not None:
                unmeasured = hindrance(self._model, gm, schedule.prunes)
            if options.guard is not None and not unmeasured:
                rest = unpruned(copied(prepared).gm, schedule, options.explicit_attention)
                dense = reported(name, prepared.skips, rest, inputs)
            short = options.token_outputs == "compact"
            compiled = rewrite(gm, schedule, short, options.force_insert, options.explicit_attention, drop)
        why = check_cuts(self._entry, compiled.gm, call.args, call.kwargs, call.leaves) if verify else ""
        if why:
            skip = _not_compared(f"with the model on the smaller map: {why}")
            compiled = replace(compiled, skips=(*compiled.skips, skip))
        pruned = reported(name, prepared.skips, compiled, inputs, merging_text(schedule, compiled.size_bias))
        return Graphs(pruned, dense, out_spec, fixed, unmeasured)

    def _graphs_for(self, args: Any, kwargs: Any) -> tuple[Call, Graphs]:
        """What inputs like these are rewritten to, with nothing compiled."""
        call = self._read(args, kwargs)
        with _CAPTURING, named("optimize"):
            plan, verify = self._find(call), self._options.verify
            return call, plan.graphs if plan is not None else self._rewrite(call, self._prepare(call, verify), verify)

    def _followed(self, call: Call) -> Any:
        """What torch.export sees: the rewritten graph of an earlier call, on the tensors that it put in place."""
        now = self._state()
        for (state, *key), plan in self._plans.items():
            if plan is not _BY_SIZE and now.traced_as(state) and tuple(key[: len(call.key)]) == call.key:
                return traced(plan.graphs, self._model, call.leaves)
        raise not_exported()

    def _find(self, call: Call) -> Program | None:
        key = (self._state(), *call.key)
        plan: Any = self._plans.get(key)
        found: Program | None = self._plans.get((*key, batch_sizes(call.leaves))) if plan is _BY_SIZE else plan
        return found

    def _plan(self, call: Call, prepared: Callable[[], PassResult], verify: bool = False) -> Program:
        """Captures, rewrites and compiles; times both sides where a guard asks for it."""
        graphs: Graphs | None = self._graphs.get((self._state(), *call.key))
        if graphs is None:
            with watched_passes(self._options.debug) if self._options.debug else contextlib.nullcontext():
                graphs = self._rewrite(call, prepared(), verify)
        return make_program(graphs, self._options, call.leaves)

    def _keep(self, before: State, call: Call, plan: Program) -> None:
        """Files a plan. What its capture left on the model (hooks, a count of calls) is no change of the model."""
        state = self._state()
        key: tuple[Any, ...] = (state, *call.key)
        for name in ("_plans", "_graphs"):
            # what is for parameters that the model has no more would keep these alive
            table = {k: v for k, v in self.__dict__[name].items() if k[0].identities == state.identities}
            self.__dict__[name] = table | {(state, *k[1:]): v for k, v in table.items() if k[0] == before}
        guarded, fixed = plan.graphs.dense is not None, plan.graphs.fixed_batch
        if guarded and not fixed:
            self._graphs[key] = plan.graphs
        if guarded or fixed:
            self._plans[key] = _BY_SIZE
            key = (*key, batch_sizes(call.leaves))
        self._plans[key] = plan


def _not_compared(why: str) -> Skip:
    return Skip("graph", f"not compared {why}", way_out="compare(inputs) holds it against the model on inputs of yours")


def optimize(
    model: nn.Module,
    schedule: Schedule | Mapping[int, float] | str | os.PathLike[str],
    *,
    backend: Backend = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    token_outputs: TokenOutputs = "restore",
    lower_attention: bool | None = None,
    progress: Progress | None = None,
    guard: Guard | None = None,
    verify: bool = True,
    constant_inputs: Collection[str] = (),
    method: str | Collection[str] = (),
    drop_unread: bool | None = None,
    outputs: Sequence[str | int] | str | int | None = None,
    debug: str | os.PathLike[str] | None = None,
) -> OptimizedModel:
    """A faster stand-in for `model`, whose code is never changed. Nothing is compiled before the first call.

    Parameters, buffers and submodules are shared, not copied: `fast.half()`, `fast.to(device)`, `fast.train()` and a
    training step change the model as well, and the model's changes are `fast`'s. To keep a model as it is, optimize
    `copy.deepcopy(model)`.

    Args:
        model: a vision model with residual MLP branches; its parameters are shared, not copied.
        schedule: after which blocks which share of the tokens stays, `{0: 0.8, 3: 0.8}`; a `Schedule`, or a file of
            one, "schedule.json".
        backend: whatever `torch.compile` takes, or "eager" for the rewritten graph uncompiled.
        mode: `torch.compile`'s.
        options: `torch.compile`'s; of Inductor's, those given go before the mode's.
        token_outputs: an output that carries tokens is given back at full length, each pruned token with the
            residual-stream value it left with ("restore"), or as a `TokenOutput` of the short sequence
            and the kept positions ("compact").
        lower_attention: whether hand-written attention becomes scaled_dot_product_attention. None: where the
            schedule prunes; with nothing to prune the result is then bit-equal to the model's.
        progress: called with a line of text at each stage of the first call, which takes seconds to a minute.
        guard: "measure" compiles the dense graph as well, times both on the first batch of each size and keeps the
            faster one for that size (dtype, device, train or eval mode, autocast), which `report()` tells. Where noise
            may explain the difference it measures on, up to 30 rounds or 20 seconds, and then keeps the pruned one
            undecided; the handle's `remeasure()` asks again. Each size is compiled by itself, twice. Nothing is
            timed in train mode or where the model writes into a buffer.
        verify: the first call with a new input signature runs the model and its captured graph on two samples,
            uncompiled and without gradients, and refuses where they do not agree: code may do something else while
            torch.export traces it. Behind a cut of a CNN's stage the model is compared with the rewritten graph as
            well, on the smaller map: code may compute something from its size. Not in train mode, nor where the model
            writes into a buffer or an input; `report()` says so.
        constant_inputs: names of inputs whose values the model's Python code reads (Qwen2-VL's `grid_thw`), which
            torch.export cannot follow: small tensors of whole numbers. A capture holds their values fast, and
            another value is another capture. On a GPU reading them waits for it at every call.
        method: names of methods beside forward to prune in as well, `"forward_features"`, `"get_image_features"`:
            `fast.forward_features(x)`. Any other that runs layers runs as the model has it, unpruned, and warns once.
        drop_unread: whether the layers behind the last attention run for those tokens alone that something reads (a
            class token, the end of a text): the last block then computes keys and values of all tokens, but queries,
            projection and MLP of these. Exact up to the order of float sums; at most half of the tokens must be read.
            None: where the schedule prunes or merges tokens; with nothing to prune the result stays bit-equal.
        outputs: names (fields of a transformers output, keys of a dict) or places of the outputs that are wanted. The
            others are None, and what only they read is not computed: with ("pooler_output",) the class token alone
            may be read. None: all.
        debug: a folder in which each pass leaves its graph as text, with what it changed, and behind each pass every
            shape is checked. None: "rs_compile_debug" where the environment has RS_COMPILE_DEBUG=1, else nowhere.

    Returns:
        A module with the model's signature, outputs, parameters and `state_dict`, and a `report()`.

    Raises:
        ScheduleError: the schedule cannot mean anything.
        OutputError: `outputs` cannot; at the first call, where the model returns no such output.
        TypeError, ValueError: another argument cannot.
    """
    check_model(model, OptimizedModel)
    methods = (method,) if isinstance(method, str) else tuple(method)
    check_methods(model, methods)
    if token_outputs not in ("restore", "compact"):
        raise ValueError(f'token_outputs is {token_outputs!r}; write "restore" or "compact"')
    if not (isinstance(backend, str) or callable(backend)):
        raise TypeError(f'backend is {backend!r}; pass what torch.compile takes, or "eager"')
    if guard not in (None, "measure"):
        raise ValueError(f'guard is {guard!r}; write "measure", or leave it out')
    if drop_unread not in (None, True, False):
        raise ValueError(f"drop_unread is {drop_unread!r}; write True or False, or leave it out")
    settings = Options(
        Schedule.of(schedule),
        backend,
        mode,
        options,
        token_outputs,
        lower_attention,
        progress,
        guard=guard,
        verify=verify,
        constant_inputs=(constant_inputs,) if isinstance(constant_inputs, str) else tuple(constant_inputs),
        methods=methods,
        drop_unread=drop_unread,
        outputs=checked(outputs),
        debug=os.fspath(debug) if debug is not None else _DEBUG * (os.environ.get("RS_COMPILE_DEBUG") == "1"),
    )
    return OptimizedModel(model, settings)
