"""The contract around every pass: what it takes, what it gives back, how it declines."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

from torch.fx import GraphModule, Node

from passes.graph.aliasing import writes

HISTORY = "history"  # gm.meta key: the names of the passes that a graph went through
ALIVE = "alive"  # node.meta key: what only a later pass will read must survive
SHOWN = "shown"  # node.meta key: what is shown to a user survives all passes

Check = Callable[[GraphModule], None]


class CompileError(Exception):
    """Anything this compiler refuses to do. The message says what to do instead."""


class ScheduleError(CompileError, ValueError):
    """A pruning schedule that cannot mean anything. The message names the value and what to write instead."""


class PassError(CompileError):
    """A pass broke its contract: a fault of the compiler, not of the model."""

    def __init__(self, said: str, name: str, gm: GraphModule) -> None:
        super().__init__(f"{said} (before {name} ran: {', '.join(gm.meta.get(HISTORY) or ('none',))})")


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
    """

    def __init__(self, reason: str, node: Node | None = None, way_out: str = "") -> None:
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
        super().__init__("\n".join(parts))


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
    def name(self) -> str:
        return type(self).__name__

    def __call__(self, gm: GraphModule) -> PassResult:
        result = self.apply(gm)
        result.gm.recompile()
        return result

    def apply(self, gm: GraphModule) -> PassResult:
        """`__call__` without the recompilation of the graph's code."""
        name, before = self.name, gm.meta.get(HISTORY, ())
        for check in self.requires:
            try:
                check(gm)
            except CompileError as error:
                raise Precondition(f"before pass {name}: {error}", name, gm) from error
        result = self.call(gm)
        result.gm.meta[HISTORY] = before
        try:
            if self.leaves_dead_code:
                result.gm.graph.lint()
            else:  # lints first; a random op that nothing reads may go, torch counts attention among them
                result.gm.graph.eliminate_dead_code(
                    lambda n: ALIVE in n.meta or SHOWN in n.meta or n.is_impure(impure_random=False) or bool(writes(n))
                )
        except RuntimeError as error:
            raise Postcondition(f"pass {name} left a malformed graph: {error}", name, result.gm) from error
        observe = OBSERVER.get()
        if observe is not None:
            observe(self, result)
        for check in self.ensures:
            try:
                check(result.gm)
            except CompileError as error:
                raise Postcondition(f"after pass {name}: {error}", name, result.gm) from error
        result.gm.meta[HISTORY] = (*before, name)
        return result


Observer: TypeAlias = Callable[[Pass, PassResult], None]
OBSERVER: ContextVar[Observer | None] = ContextVar("observer", default=None)  # sees the graph after each pass


def finish(gm: GraphModule) -> None:
    """Brings a graph's code up to date after passes were applied, and lets go of the nodes that they removed."""
    live, names = set(gm.graph.nodes), gm.graph._graph_namespace._obj_to_name
    for gone in [n for n in names if isinstance(n, Node) and n not in live]:
        del names[gone]  # its value would stay with it
    gm.recompile()


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
