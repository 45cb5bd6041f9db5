"""One model through the compiler, held against the model itself and against pruning by hand."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

import rs_compile
from bench.coverage.grid_twin import cut_by_hand, maps, same_shape, strays
from bench.coverage.oracle import Layer, find_layers, prune_by_hand
from bench.coverage.subject import Subject
from bench.coverage.sums import NoSum
from passes.graph.base import CompileError
from passes.graph.ops import SDPA, SOFTMAX
from passes.grid_pipeline import cuttable
from passes.network.branches import Block, Branch, blocks_of, find_branches, module_path
from passes.network.protected import Protected
from passes.network.prunable import protected_tokens, prunable
from passes.network.stages import Stage, find_stages
from passes.pipeline import check_blocks, prepare
from rs_compile.report import BlockRow
from rs_compile.signature import constant_leaves

BATCH = 3
KEEP = 0.7
TOLERANCE = 1e-4  # of the largest absolute value; models run in float64 where they can
PRUNED, UNHOOKED, REFUSED = "prunes", "prunes, no hand-made twin", "refused"
GRID, GRID_ALONE = "rows and columns", "rows and columns, no hand-made twin"
WRONG, FAULT, BROKEN = "WRONG", "FAULT", "does not run"
Row = dict[str, Any]


def check(subject: Subject, compiled: bool = False) -> Row:
    """Everything the table says about a subject.

    Args:
        subject: the model.
        compiled: whether it also goes through Inductor.

    Returns:
        result: one of the names above; detail: the refusal, or what is wrong; blocks, prunable, sites, protected;
        error: the largest difference from the hand-made twin, relative to the largest value;
        export, rewrite: processor seconds of torch.export alone, its batch symbolic; of capture and passes.
    """
    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(False)  # without gradients only, and it rounds otherwise
    row: Row = {}
    try:
        model = subject.build().eval()
        randomise(model)
        given = subject.inputs(BATCH)
        dense = call(model, given)()
    except Exception as error:
        return {"result": BROKEN, "detail": first_line(error)}
    try:
        _check(subject, model, given, dense, compiled, row)
    except CompileError as refusal:
        row |= {"result": REFUSED, "detail": str(refusal)}
    except Exception as error:
        row |= {"result": FAULT, "detail": f"{type(error).__name__}: {first_line(error)}"}
    return row


def _check(subject: Subject, model: nn.Module, given: Any, dense: Any, compiled: bool, row: Row) -> None:
    """Fills the row as it finds out, so that what was found before a refusal stays."""
    optimize = partial(rs_compile.optimize, constant_inputs=subject.constant)
    args, kwargs = as_call(given)
    gm = prepare(model, args, kwargs, lower=True, constant=constant_leaves(model, args, kwargs, subject.constant)).gm
    branches = find_branches(gm)
    blocks = blocks_of(branches)
    answers = [prunable(gm, block, branches) for block in blocks]
    able = [i for i, answer in enumerate(answers) if answer.able]
    row |= {"blocks": len(blocks), "prunable": len(able)}
    if not able:
        stages = [(stage, cuttable(stage)) for stage in find_stages(gm)]
        cut = next((stage for stage, (yes, _) in stages if yes and min(stage.grid) > 1), None)
        if cut is not None:
            row |= _check_grid(model, given, cut)
            return
        reasons = [answer.reason for answer in answers] or [reason for _, (_, reason) in stages]
        row |= {"result": REFUSED, "detail": reasons[0] if reasons else _why_none(gm, blocks, branches)}
        return
    same = call(optimize(model, {able[0]: 1.0}, backend="eager"), given)()
    if wrong := differs(same, dense, 0.0)[1]:
        row |= {"result": WRONG, "detail": f"keep ratio 1: {wrong}"}
        return
    sites = sorted({able[0], able[len(able) // 2]})
    guard = protected_tokens(gm, blocks[sites[0]], None)
    row |= {"sites": sites, "protected": [guard.prefix, guard.suffix, *guard.extra]}
    exact, inputs = _float64(model, given)
    schedule = rs_compile.Schedule(keep=dict.fromkeys(sites, KEEP))
    marks: list[float] = []
    handle = optimize(
        exact,
        schedule,
        backend="eager",
        progress=lambda _: marks.append(time.process_time()),
        verify=False,  # done above, and not to be timed
    )
    call(handle, inputs)()
    marks.append(time.process_time())
    short = call(handle, inputs)()  # again, to be taken off the first call
    row["export"] = round(marks[1] - marks[0], 2)
    row["rewrite"] = round(2 * marks[-1] - time.process_time() - marks[0], 2)
    full = call(exact, inputs)()
    if wrong := differs(short, full, None)[1]:
        row |= {"result": WRONG, "detail": f"outputs: {wrong}"}
        return
    until = {node for i in sites for node in answers[i].until}
    if sites == [len(blocks) - 1] and not differs(short, full, TOLERANCE)[1]:
        row |= {"result": UNHOOKED, "detail": "behind the last block every token is needed: nothing changes"}
    else:
        by_hand = partial(_by_hand, blocks=blocks, guard=guard, until=until, report=handle.report().blocks)
        try:
            row |= by_hand(exact, inputs, short, full, schedule)
        except NoSum:  # the branch alone cannot be told by hand: the whole block can
            schedule = rs_compile.Schedule(keep=schedule.keep, score=rs_compile.Shift(of="block"))
            short = call(optimize(exact, schedule, backend="eager"), inputs)()
            row |= by_hand(exact, inputs, short, full, schedule) | {"score": "block"}
    if compiled:
        fused = call(optimize(exact, schedule), inputs)()
        if wrong := differs(fused, short, TOLERANCE)[1]:
            row |= {"result": WRONG, "detail": f"compiled: {wrong}"}
        row["compiled"] = True


def _by_hand(
    model: nn.Module,
    given: Any,
    short: Any,
    full: Any,
    schedule: rs_compile.Schedule,
    blocks: list[Block],
    guard: Protected,
    until: Collection[Node],
    report: Sequence[BlockRow],
) -> Row:
    """Holds the pruned outputs against pruning by hand, where the blocks are modules."""
    found = find_layers(model, call(model, given), BATCH)
    layers = {block.index: layer_of(block, found) for block in blocks}
    stream = layers[min(schedule.keep)]
    alone = any(blocks[i].attention is None for i in schedule.keep)  # an MLP, and not all of a layer
    turned = stream is not None and stream.length != report[min(schedule.keep)].tokens_in  # [B, C, N]
    if stream is None or guard.extra or alone or turned:
        return {"result": UNHOOKED}
    own = stream.path.rpartition(".")[0]
    mine = {i: layer for i, layer in layers.items() if layer is not None and layer.path.rpartition(".")[0] == own}
    hooked = list(dict.fromkeys(mine.values()))
    keep = {hooked.index(mine[i]): ratio for i, ratio in schedule.keep.items() if i in mine}
    if len(hooked) < len(mine) or len(keep) < len(schedule.keep):
        return {"result": UNHOOKED}  # a module that is more than one block
    last = max(schedule.keep)
    if any(r.block > last and r.block not in mine and r.tokens_in == report[last].tokens_out for r in report):
        return {"result": UNHOOKED}  # layers of another kind run on what is left
    ends = {block.index for block in blocks if block.output in until}
    if len(ends) < len(until) or not ends <= mine.keys():
        return {"result": UNHOOKED}  # tokens come back inside a module
    back = {hooked.index(mine[i]) for i in ends}
    padding = _padding(given, stream.length, guard)
    assert isinstance(schedule.score, rs_compile.Shift) and schedule.score.of != "attention"
    edges = (guard.prefix, guard.suffix)
    twin = prune_by_hand(model, call(model, given), hooked, keep, edges, padding, back, schedule.score.of)
    error, wrong = differs(short, twin, TOLERANCE)
    if wrong:
        return {"result": WRONG, "error": error, "detail": f"against the hand-made twin: {wrong}"}
    if not differs(twin, full, TOLERANCE)[1]:
        return {"result": UNHOOKED, "detail": "pruning by hand changes nothing that leaves the model"}
    return {"result": PRUNED, "error": error}


def _padding(given: Any, length: int, guard: Protected) -> Tensor | None:
    """[B, N], true for tokens that are none, by what such models are given: a mask, or patches of zeros."""
    inputs = given if isinstance(given, Mapping) else {}
    masks = [inputs[name] == 0 for name in ("attention_mask", "pixel_attention_mask") if name in inputs]
    masks += [~inputs["flattened_patches"].any(-1)] if "flattened_patches" in inputs else []
    # tokens of the model's own are no padding
    masks += [nn.functional.pad(m, ends) for m in masks[:1] for ends in ((guard.prefix, 0), (0, guard.suffix))]
    return next((m for m in masks if tuple(m.shape) == (BATCH, length)), None)


def layer_of(block: Block, layers: list[Layer]) -> Layer | None:
    """The layer that a block of the compiler is, by its place in the model, where its attention is in it as well."""
    attention = block.attention.nodes if block.attention is not None else frozenset()
    places = [block.where, *(path for n in attention if n.target in {SDPA, *SOFTMAX} and (path := module_path(n)))]
    return next((y for y in layers if all(f"{place}.".startswith(f"{y.path}.") for place in places)), None)


def _check_grid(model: nn.Module, given: Any, stage: Stage) -> Row:
    # powers of two, so that later stages halve what is left as they halve the whole
    gone = [2 ** max(0, (size // 4).bit_length() - 1) for size in stage.grid]
    schedule = rs_compile.Schedule(grid={stage.index: rs_compile.GridPrune(*gone)})
    exact, inputs = _float64(model, given)
    short, full = (call(m, inputs)() for m in (rs_compile.optimize(exact, schedule, backend="eager"), exact))
    row: Row = {"sites": [stage.index]}
    if wrong := differs(short, full, None)[1]:
        return row | {"result": WRONG, "detail": f"outputs: {wrong}"}
    args, kwargs = as_call(inputs)
    gm = prepare(exact, args, kwargs, lower=True).gm
    cut = find_stages(gm)[stage.index]
    output, after, shortcut = _values(gm, (cut.output, cut.sums, cut.shortcut), pytree.tree_leaves((args, kwargs)))
    try:
        twin = cut_by_hand(call(exact, inputs), output, after, shortcut, *gone)
    except Exception as stopped:  # the model itself cannot go on with a smaller map
        return row | {"result": GRID_ALONE, "detail": f"by hand: {first_line(stopped)}"}
    whole = same_shape(twin, full)
    leaves = [pytree.tree_leaves(x) for x in (short, twin, full)]
    got, wanted, before = ([x[i] for i in whole] for x in leaves)
    # a map that comes back has cells of the small one, or is the model's own where it needs no other cell
    spread = [i for i in maps(twin, full) if differs(leaves[0][i], leaves[2][i], TOLERANCE)[1]]
    if not spread and not (whole and differs(wanted, before, TOLERANCE)[1]):
        return row | {"result": GRID_ALONE, "detail": "what leaves the model does not depend on the cut"}
    error, wrong = differs(got, wanted, TOLERANCE)
    for i in spread:
        error = max(error, strays(leaves[0][i], leaves[1][i]))
        if error > TOLERANCE:
            wrong = wrong or f"output {i} {tuple(leaves[0][i].shape)} has a cell that the smaller map has not"
    if wrong:
        return row | {"result": WRONG, "error": error, "detail": f"against the hand-made twin: {wrong}"}
    return row | {"result": GRID, "error": error}


def _values(gm: GraphModule, nodes: Sequence[Node], leaves: Sequence[Any]) -> list[Tensor]:
    """What some nodes of a graph are for these inputs."""
    run = Interpreter(gm, garbage_collect_values=False)
    with torch.no_grad():
        run.run(*leaves)
    return [run.env[node] for node in nodes]


def _why_none(gm: GraphModule, blocks: list[Block], branches: list[Branch]) -> str:
    try:
        check_blocks(gm, blocks, branches, [0])
    except CompileError as refusal:
        return str(refusal)
    raise AssertionError("no block was found, and a schedule of one was taken")


def as_call(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments."""
    return ((), dict(given)) if isinstance(given, Mapping) else ((given,), {})


def call(model: nn.Module, given: Any) -> Callable[[], Any]:
    """A function that runs the model."""
    args, kwargs = as_call(given)

    def run() -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    return run


def differs(got: Any, wanted: Any, tolerance: float | None) -> tuple[float, str]:
    """The largest difference relative to the largest value, and what is wrong, "" where nothing is.

    Args:
        tolerance: None to compare nesting, shapes and dtypes only.
    """
    if type(got) is not type(wanted):
        return float("inf"), f"{type(got).__name__} instead of {type(wanted).__name__}"
    (a, spec), (b, other) = pytree.tree_flatten(got), pytree.tree_flatten(wanted)
    if spec != other:
        return float("inf"), f"{spec} instead of {other}"
    worst = 0.0
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if not isinstance(y, Tensor):
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            return float("inf"), f"output {i} is {tuple(x.shape)} {x.dtype} instead of {tuple(y.shape)} {y.dtype}"
        if tolerance is None or not y.numel() or torch.equal(x, y):
            continue
        x, y = x.double(), y.double()
        equal = (x == y) | (x.isnan() & y.isnan())
        scale = y[y.isfinite()].abs().max().item() if y.isfinite().any() else 0.0
        gap = ((x - y).abs() / (scale or 1.0)).masked_fill(equal, 0.0).nan_to_num(nan=torch.inf).max().item()
        worst = max(worst, gap)
        if gap > tolerance:
            return worst, f"output {i} {tuple(y.shape)} differs by {gap:.1e} of its largest value"
    return worst, ""


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Moves every parameter, so that tokens differ and no branch is nothing (LayerScale starts at 1e-5)."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            width = 0.2 if parameter.dim() < 2 else 0.5 * max(1, parameter[0].numel()) ** -0.5
            parameter.add_(width * torch.randn(parameter.shape, generator=generator).to(parameter))


def _float64(model: nn.Module, given: Any) -> tuple[nn.Module, Any]:
    """Model and inputs in float64, so that rounding decides nothing; as they are where the model cannot."""

    def double(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    inputs = {k: double(v) for k, v in given.items()} if isinstance(given, Mapping) else double(given)
    with contextlib.suppress(RuntimeError):
        call(model.double(), inputs)()
        return model, inputs
    return model.float(), given


def first_line(error: BaseException) -> str:
    """Of what an error says."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
