"""softmax(s Q K^T + mask) V found in a graph, in whatever spelling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from passes.attention.constants import Constants
from passes.graph.base import op_name
from passes.graph.contraction import Contraction, order
from passes.graph.ops import arguments, aten_name, same_sizes

SAME = {"contiguous", "clone", "alias", "lift_fresh_copy"}
CASTS = {"to", "_to_copy", "type_as"}
RESHAPES = {"view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten"}
TURNS = {"transpose", "permute", "mT", "swapaxes"}
LOWEST = -1e4  # logits stay far above: exp(LOWEST - logit) underflows to 0, as -inf gives
ABSORBS = -1e30  # a bias added to this changes nothing in float32


class Miss(Exception):
    """This softmax is no attention that SDPA can express; says why."""


@dataclass(frozen=True)
class Step:
    """One thing done to the logits: scale, add, fill (where node), keep (fill elsewhere), temper, reshape."""

    kind: str
    node: Node
    value: float = 1.0


class Attention:
    """One match, built from a softmax node; raises `Miss`."""

    def __init__(self, softmax: Node, constants: Constants) -> None:
        if free_unbacked_symbols(softmax.meta["val"].shape):
            raise Miss("how many queries and keys there are depends on the data")
        self.constants = constants
        self.chain = [softmax]
        self.dropout_p = 0.0
        self.first, self.steps = self._logits(arguments(softmax)["self"])
        self._to_values(softmax)
        self._bind()
        self._settle()

    def _logits(self, node: Node) -> tuple[Contraction, list[Step]]:
        """Back from the softmax's input to Q K^T, and the steps from there, in order."""
        if len(users := _users(node)) > 1:
            raise Miss(f"the attention logits have {len(users)} users: {', '.join(u.name for u in users)}")
        if (product := Contraction.of(node)) is not None:
            _sides(product)  # or a Miss, and another reading of a sum is tried
            self.chain.append(node)
            if aten_name(node) != "baddbmm":
                return product, []
            given = arguments(node)
            bias = [Step("add", given["self"], given["beta"])] if given["beta"] != 0 else []
            return product, [Step("scale", node, given["alpha"]), *bias]
        misses = []
        for source, steps in self._readings(node):
            try:
                product, before = self._logits(source)
            except Miss as miss:
                misses.append(miss)
                continue
            self.chain.append(node)
            return product, before + steps
        raise misses[0] if misses else Miss(f"{_name(node)} stands between Q K^T and the softmax")

    def _readings(self, node: Node) -> list[tuple[Node, list[Step]]]:
        """Every way to read `node` as (earlier logits, what was done to them)."""
        name = aten_name(node)
        if _same_numbers(node):
            return [(node.all_input_nodes[0], [])]
        if _moves_batch(node):
            return [(node.all_input_nodes[0], [Step("reshape", node)])]
        if name not in ("mul", "div", "add", "sub", "masked_fill", "where"):
            return []
        given = arguments(node)
        source, other, alpha = given["self"], given.get("other"), given.get("alpha", 1)
        readings: list[tuple[Any, list[Step]]] = []
        if name == "masked_fill":
            if (fill := self.constants.number(given["value"])) is not None:
                readings = [(source, [Step("fill", given["mask"], fill)])]
        elif name == "where":
            for logits, value, kind in ((source, other, "keep"), (other, source, "fill")):
                if isinstance(logits, Node) and (fill := self.constants.number(value)) is not None:
                    readings.append((logits, [Step(kind, given["condition"], fill)]))
        elif name in ("mul", "div") and given.get("rounding_mode") is None:
            if isinstance(other, int | float):
                readings = [(source, [Step("scale", node, other if name == "mul" else 1 / other)])]
            elif isinstance(other, Node):
                readings = [(source, [Step("temper", other, 1.0 if name == "mul" else -1.0)])]
                if name == "mul":
                    readings.append((other, [Step("temper", source)]))
        elif isinstance(other, int | float):
            readings = [(source, [])]  # the softmax does not see a shift
        elif name in ("add", "sub") and isinstance(other, Node):
            readings = [(source, [Step("add", other, alpha if name == "add" else -alpha)])]
            if name == "add":
                readings.append((other, [Step("scale", node, alpha), Step("add", source)]))
        shape = node.meta["val"].shape
        tensors = [r for r in readings if isinstance(r[0], Node) and isinstance(r[0].meta["val"], Tensor)]
        return [r for r in tensors if same_sizes(r[0].meta["val"].shape, shape)]

    def _to_values(self, softmax: Node) -> None:
        """Forward to the product with V; `turned` says which softmax dim each dim of its operand is."""
        node, turned = softmax, list(range(softmax.meta["val"].dim()))
        while True:
            if len(users := _users(node)) != 1:
                names = ", ".join(u.name for u in users)
                raise Miss(f"the attention probabilities have {len(users)} users: {names}")
            user = users[0]
            if (product := Contraction.of(user)) is not None:
                break
            if user.op == "output":
                raise Miss("the attention probabilities are an output of the model")
            if aten_name(user) in TURNS:
                turned = [turned[d] for d in _turn(user)]
            elif _moves_batch(user) and turned == sorted(turned):
                self.steps.append(Step("reshape", user))
                turned = list(range(user.meta["val"].dim()))
            elif aten_name(user) == "dropout" and not _same_numbers(user) and self.dropout_p == 0.0:
                self.dropout_p = float(arguments(user)["p"])
            elif not _same_numbers(user):
                raise Miss(f"{_name(user)} stands between the softmax and the product with V")
            self.chain.append(user)
            node = user
        if product.left is product.right or aten_name(user) == "baddbmm":
            raise Miss(f"{_name(user)} does more than multiply V by the probabilities")
        self.second, self.probabilities, self.turned = product, node, turned

    def _bind(self) -> None:
        """Finds query, key and value, and the order of their dims, from the two products."""
        first, second = self.first, self.second
        *batch, n, m = list(first.dims)
        (self.q, q_dims), (self.k, k_dims) = _sides(first)
        inner = set(q_dims) & set(k_dims) - set(first.dims)
        self.q_order = order(q_dims, [*batch, n, *inner])
        self.k_order = order(k_dims, [*batch, m, *inner])
        sides = [(second.left, second.left_dims), (second.right, second.right_dims)]
        (_, p_dims), (self.v, v_dims) = sides if second.left is self.probabilities else sides[::-1]
        labels = dict(zip(self.turned, p_dims, strict=True))
        *batch, n, m = [labels[i] for i in range(len(labels))]
        channel = [d for d in v_dims if d not in p_dims]
        if m in second.dims or m not in v_dims:
            raise Miss("the softmax is not over the keys, which the product with V sums over")
        if len(channel) != 1 or n in v_dims or sorted(second.dims) != sorted([*batch, n, *channel]):
            raise Miss(f"{_name(second.node)} is not laid out as P V")
        self.v_order = order(v_dims, [*batch, m, *channel])
        self.out_order = order("".join([*batch, n, *channel]), second.dims)

    def _settle(self) -> None:
        """Folds all scales into one and declines what one scale and one mask cannot say."""
        dtypes = {x.meta["val"].dtype for x in (self.q, self.k, self.v, self.second.node)}
        self.dtype = self.q.meta["val"].dtype
        if len(dtypes) > 1 or not self.dtype.is_floating_point:
            raise Miss("query, key, value and result are of " + " and ".join(sorted(map(str, dtypes))))
        for node in self.chain:
            if node.meta["val"].dtype.itemsize < self.dtype.itemsize:
                raise Miss(f"{_name(node)} rounds to {node.meta['val'].dtype}")
        self.scale, steps = 1.0, []
        for step in reversed(self.steps):
            if step.kind == "scale":
                self.scale *= step.value
            elif step.kind in ("add", "fill", "keep"):
                if not self.constants.hides_nothing(step.node, keeps=step.kind == "keep"):
                    steps.append(Step(step.kind, step.node, step.value * self.scale))
            else:
                steps.append(step)
        self.steps = steps[::-1]
        masked, filled = False, 0.0
        for step in self.steps:
            val = step.node.meta["val"]
            if step.kind == "temper":
                if val.dim() and val.shape[-1] != 1:
                    raise Miss(f"{_name(step.node)} weighs the logits key by key")
                if masked:
                    raise Miss(f"{_name(step.node)} scales logits that are masked already")
            elif step.kind == "reshape":
                if sum(not isinstance(size, int) for size in val.shape) > 1:
                    raise Miss(f"{_name(step.node)} makes two dims of unknown size")
            else:
                filled = self._check_mask(step, val.dtype, filled)
                masked = True
        begun = self.constants.position[self.first.node]
        for node in (self.q, self.k, self.v, *(s.node for s in self.steps if s.kind != "reshape")):
            if self.constants.changed.get(node, -1) > begun:
                raise Miss(f"{_name(node)} is changed in place")

    def _check_mask(self, step: Step, dtype: torch.dtype, filled: float) -> float:
        """Declines a mask that would change a result; the finite fill so far comes in and goes out."""
        if step.kind == "add":
            if not dtype.is_floating_point or self.dtype == torch.float16 != dtype:
                raise Miss(f"a mask of {dtype} is added to logits of {self.dtype}")
            if ABSORBS < filled < 0:
                raise Miss(f"a mask is added to logits which were filled with {filled:g}")
            return filled
        if not step.value <= LOWEST or dtype != torch.bool:
            raise Miss(f"logits are filled with {step.value:g}, which hides no key")
        if math.isinf(step.value):
            return filled
        if self.dtype == torch.float16:
            raise Miss("float16 logits are filled with a finite value, beside which they still count")
        if filled not in (0.0, step.value):
            raise Miss(f"logits are filled with {filled:g} and with {step.value:g}")
        return step.value


def _sides(product: Contraction) -> tuple[tuple[Node, str], tuple[Node, str]]:
    """Query and key of Q K^T, each with its dims."""
    n, m = product.dims[-2], product.dims[-1]
    left, right = (product.left, product.left_dims), (product.right, product.right_dims)
    (q, q_dims), (k, k_dims) = (left, right) if n in product.left_dims else (right, left)
    shared, summed = set(q_dims) & set(k_dims), (set(q_dims) | set(k_dims)) - set(product.dims)
    if len(summed) != 1 or not summed <= shared or n in k_dims or m in q_dims:
        raise Miss(f"{_name(product.node)} is not laid out as Q K^T, [..., queries, keys]")
    return (q, q_dims), (k, k_dims)


def _users(node: Node) -> list[Node]:
    return [user for user in node.users if aten_name(user) != "_assert_tensor_metadata"]


def _name(node: Node) -> str:
    return f"{op_name(node)} ({node.name})"


def _same_numbers(node: Node) -> bool:
    """Whether a node hands its input on: a copy, a cast, a dropout that is off, a view of the same shape."""
    name = aten_name(node)
    if name == "dropout":
        return arguments(node)["p"] == 0 or not arguments(node)["train"]
    if name in SAME:
        return True
    if name not in CASTS | RESHAPES | {"expand"}:
        return False
    val, before = node.meta["val"], node.all_input_nodes[0].meta["val"]
    return same_sizes(val.shape, before.shape) and val.device == before.device and val.is_floating_point()


def _moves_batch(node: Node) -> bool:
    """Whether a view only splits or joins dims in front of [Nq, Nk]."""
    if aten_name(node) not in RESHAPES:
        return False
    val, before = node.meta["val"], node.all_input_nodes[0].meta["val"]
    return min(val.dim(), before.dim()) >= 3 and same_sizes(val.shape[-2:], before.shape[-2:])


def _turn(node: Node) -> list[int]:
    """The permutation that a transpose or permute makes."""
    dims = list(range(node.meta["val"].dim()))
    if aten_name(node) == "permute":
        return [dims[d] for d in arguments(node)["dims"]]
    a, b = (-2, -1) if aten_name(node) == "mT" else list(arguments(node).values())[1:3]
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def fed_by_product(softmax: Node) -> bool:
    """Whether logits of these sizes come from a matrix product a few ops before."""
    logits = softmax.meta["val"]

    def resembles(node: Node) -> bool:
        val = node.meta.get("val")
        if not isinstance(val, Tensor) or val.dim() < 3:
            return False
        # a comparison of symbols that is not static would fix the batch where it happens to hold
        has = all(any(same_sizes([size], [other]) for other in val.shape) for size in logits.shape[-2:])
        return has or same_sizes([val.numel()], [logits.numel()])

    front = [softmax]
    for _ in range(12):
        front = [n for node in front for n in node.all_input_nodes if resembles(n)]
        if any(Contraction.of(n) is not None for n in front):
            return True
    return False
