"""The contract around every pass: what it takes, what it gives back, how it declines."""

from __future__ import annotations

import abc
import inspect
import logging
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passes.graph.aliasing import writes
from passes.graph.codes import Code
from passes.graph.facts import Fact

HISTORY: Fact[tuple[str, ...]] = Fact("history")  # of graphs: the names of the passes that a graph went through
ALIVE: Fact[bool] = Fact("alive")  # of nodes: what only a later pass will read must survive
SHOWN: Fact[bool] = Fact("shown")  # of nodes: what is shown to a user survives all passes

Check = Callable[[GraphModule], None]


class CompileError(Exception):
    """Anything this compiler refuses to do. The message says what to do instead.

    Args:
        text: the message; its first line is shown with the code behind it.
        code: the family that the refusal belongs to; the class's own where there is none.
    """

    family: ClassVar[Code] = Code.FAULT

    def __init__(self, text: str, *, code: Code | None = None) -> None:
        super().__init__(text)
        self.code: Code = code or self.family

    @property
    def text(self) -> str:
        """The message without its code."""
        return str(self.args[0])

    def __str__(self) -> str:
        first, line, more = self.text.partition("\n")
        return f"{first} [{self.code}]{line}{more}"


class ScheduleError(CompileError, ValueError):
    """A pruning schedule that cannot mean anything. The message names the value and what to write instead."""

    family = Code.SCHEDULE


class PassError(CompileError):
    """A pass broke its contract: a fault of the compiler, not of the model."""

    def __init__(self, said: str, name: str, gm: GraphModule) -> None:
        super().__init__(f"{said} (before {name} ran: {', '.join(HISTORY.get(gm) or ('none',))})")


class Precondition(PassError):
    """A graph came to a pass that does not hold what the pass requires."""


class Postcondition(PassError):
    """A pass left a graph that does not hold what the pass ensures."""


class Refusal(CompileError):
    """The compiler cannot prove that a rewrite is right; it names the op, the line and a way out.

    Args:
        reason: what cannot be proven, in a clause.
        node: where.
        way_out: what the user can do about it.
        code: the family that it belongs to.
    """

    def __init__(self, reason: str, node: Node | None = None, way_out: str = "", *, code: Code | None = None) -> None:
        self.reason = reason
        self.node_name = node.name if node is not None else ""
        self.op = op_name(node) if node is not None else ""
        self.where = source_line(node) if node is not None else ""
        self.way_out = way_out
        parts = [f"{self.op} ({self.node_name}): {reason}" if node is not None else reason]
        if self.where:
            parts.append(f"  in the model: {self.where}")
        if way_out:
            parts.append(f"  way out: {way_out}")
        super().__init__("\n".join(parts), code=code)


@dataclass(frozen=True)
class Reason:
    """Why an op is not carried through, and the family that a refusal for it belongs to."""

    text: str
    code: Code

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Skip:
    """A place where a pass could have fired and did not, for the user's report; what a user can do about it."""

    node: str
    reason: str
    where: str = ""
    way_out: str = ""

    @classmethod
    def at(cls, node: Node, reason: str, way_out: str = "") -> Skip:
        return cls(node.name, reason, source_line(node), way_out)


@dataclass(frozen=True)
class PassResult:
    """The graph after a pass, how many places it rewrote, and where it declined."""

    gm: GraphModule
    rewrites: int = 0
    skips: tuple[Skip, ...] = field(default=())


@dataclass(frozen=True)
class Pass(abc.ABC):
    """One rewrite. `pass_(gm)` runs `requires` on the input, `call`, clean-up, `ensures` on the result.

    Every pass ensures that each op that is read has a fake value, and that outputs keep their dtypes and literal sizes.
    The checks here are cheap; `passes.graph.debug` runs the whole graph on fake tensors behind every pass.
    `apply` does the same and leaves the graph's code stale, for who calls `finish` after the last of many passes.
    A pass may change the graph module in place: it is the compiler's private copy.
    """

    requires: ClassVar[tuple[Check, ...]] = ()
    ensures: ClassVar[tuple[Check, ...]] = ()
    leaves_dead_code: ClassVar[bool] = False  # what only the next pass will read must survive

    @abc.abstractmethod
    def call(self, gm: GraphModule) -> PassResult:
        """Rewrites `gm`; must not run dead-code removal, lint or recompile: they come after it."""

    @property
    def changes_outputs(self) -> bool:
        """Whether the graph gives other outputs afterwards."""
        return False

    @property
    def name(self) -> str:
        return type(self).__name__

    def __call__(self, gm: GraphModule) -> PassResult:
        result = self.apply(gm)
        result.gm.recompile()
        return result

    def apply(self, gm: GraphModule) -> PassResult:
        """`__call__` without the recompilation of the graph's code."""
        name, before = self.name, HISTORY.get(gm) or ()
        _hold(self.requires, gm, Precondition, f"before pass {name}", name)
        outputs = _outputs(gm)
        result = self.call(gm)
        HISTORY.put(result.gm, before)
        try:
            if self.leaves_dead_code:
                result.gm.graph.lint()
            else:  # lints first; a random op that nothing reads may go, torch counts attention among them
                result.gm.graph.eliminate_dead_code(
                    lambda n: ALIVE.known(n) or SHOWN.known(n) or n.is_impure(impure_random=False) or bool(writes(n))
                )
        except RuntimeError as error:
            raise Postcondition(f"pass {name} left a malformed graph: {error}", name, result.gm) from error
        logging.getLogger(f"passes.{name}").debug("%d rewrites, %d skips", result.rewrites, len(result.skips))
        observe = OBSERVER.get()
        if observe is not None:
            observe(self, result)
        ensured = (known_values, *(() if self.changes_outputs else (_same(outputs),)), *self.ensures)
        _hold(ensured, result.gm, Postcondition, f"after pass {name}", name)
        HISTORY.put(result.gm, (*before, name))
        return result


def _hold(checks: Iterable[Check], gm: GraphModule, kind: type[PassError], when: str, name: str) -> None:
    for check in checks:
        try:
            check(gm)
        except Refusal:
            raise  # of the model, not of the pass
        except CompileError as error:
            raise kind(f"{when}: {error.text}", name, gm) from error


def known_values(gm: GraphModule) -> None:
    """Each op of ATen or of a library that is read has a value on fake tensors.

    Raises:
        CompileError: one has none.
    """
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.users and "val" not in node.meta:
            raise CompileError(f"{node.name} ({op_name(node)}) has no fake value in its meta", code=Code.FAULT)


Output: TypeAlias = tuple[torch.dtype, tuple[int | None, ...]] | None


def _outputs(gm: GraphModule) -> list[Output]:
    """Dtype and literal sizes of each output; None for a size that counts samples, and for what is no known tensor."""
    leaves = pytree.tree_leaves(gm.graph.output_node().args)
    values = [leaf.meta.get("val") if isinstance(leaf, Node) else leaf for leaf in leaves]
    return [
        (v.dtype, tuple(s if isinstance(s, int) else None for s in v.shape)) if isinstance(v, torch.Tensor) else None
        for v in values
    ]


def _differ(now: Output, before: Output) -> bool:
    if now is None or before is None:
        return False
    sizes = zip(now[1], before[1], strict=False)
    return (
        now[0] != before[0]
        or len(now[1]) != len(before[1])
        or any(None not in pair and pair[0] != pair[1] for pair in sizes)
    )


def _same(outputs: list[Output]) -> Check:
    def same_outputs(gm: GraphModule) -> None:
        now = _outputs(gm)
        if len(now) != len(outputs) or any(map(_differ, now, outputs)):
            raise CompileError(f"the outputs are {now}, and were {outputs}", code=Code.FAULT)

    return same_outputs


Observer: TypeAlias = Callable[[Pass, PassResult], None]
OBSERVER: ContextVar[Observer | None] = ContextVar("observer", default=None)  # sees the graph after each pass


def finish(gm: GraphModule, *ensures: Check) -> None:
    """Brings a graph's code up to date after passes were applied, and lets go of the nodes that they removed.

    Raises:
        Postcondition: what must hold of the result does not.
    """
    live, names = set(gm.graph.nodes), gm.graph._graph_namespace._obj_to_name
    for gone in [n for n in names if isinstance(n, Node) and n not in live]:
        del names[gone]  # its value would stay with it
    gm.recompile()
    _hold(ensures, gm, Postcondition, "after all passes", "this check")


def op_name(node: Node) -> str:
    """`aten.linear.default` for an op node, the target's name otherwise."""
    if node.op != "call_function":
        return f"{node.op} {node.target}"
    # a function's text would hold its address
    return node.target.__name__ if inspect.isfunction(node.target) else str(node.target)


def source_line(node: Node) -> str:
    """The innermost line of the model's own source that made this node, or ''."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    frames = [
        (place.strip(), code.strip())
        for place, code in zip(lines[::2], lines[1::2], strict=False)
        if place.strip().startswith("File ")
    ]
    # the layer's own source, not the body of nn.Linear
    own = [frame for frame in frames if "/torch/nn/" not in frame[0]] or frames
    return f"{own[-1][0]}: {own[-1][1]}" if own else ""
