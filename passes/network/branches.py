"""Residual branches, found by dataflow: the one node both paths start from, the one sum where they meet.

A sum of terms is residual where every other term is computed from one of them, the stream, which a number may
scale. What lies on a branch says what it is. Names of classes and modules are never consulted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.axes.token_axis import analyse, mixing, stream_layout
from passes.graph.base import Refusal, source_line
from passes.graph.layout import sequence_in
from passes.graph.ops import CASTS, CONV, LINEAR, NORMS, PASS_ON, PRODUCTS, SCALES, SDPA, SOFTMAX, elementwise, sizes_of

aten = torch.ops.aten
AFFINE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default}
LIKE = {  # read the shape of a value, not what is in it
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_full.default, aten.new_empty.default, aten.empty_like.default,
}  # fmt: skip


@dataclass(frozen=True)
class Branch:
    """A residual branch: `add = stream + term`, the term computed from the stream, which a number may scale.

    Args:
        kind: "attention", "mlp", "conv", "mixer".
        stream: x, [B, N, C].
        term: F(x), what is added to it.
        add: the sum.
        nodes: what lies on the branch.
        reason: for a mixer, why no rule carries tokens through it; "" where they are carried, and mixed.
        at: the op that the reason is about.
    """

    kind: str
    stream: Node
    term: Node
    add: Node
    nodes: frozenset[Node] = field(repr=False)
    reason: str = ""
    at: Node | None = field(default=None, repr=False)

    @property
    def whole(self) -> bool:
        """Whether tokens may leave behind it: it is a layer of its own, not a part of one."""
        return self.kind in ("attention", "mlp") or (self.kind == "mixer" and not self.reason)


@dataclass(frozen=True)
class Block:
    """An MLP branch, and the branch before it (or beside it) that mixes tokens, attention or another, if there is one.

    In a model without MLPs (a state-space model) `mlp` is the branch that mixes tokens: all that a block has.
    """

    index: int
    mlp: Branch
    attention: Branch | None = None
    depth: int = 1  # how many blocks the network has

    @property
    def output(self) -> Node:
        """The residual stream after the complete block."""
        return self.mlp.add

    @property
    def nodes(self) -> frozenset[Node]:
        """What lies on its branches."""
        return self.mlp.nodes | (self.attention.nodes if self.attention is not None else frozenset())

    @property
    def entry(self) -> Node:
        """The residual stream before the block."""
        return self.attention.stream if self.attention is not None else self.mlp.stream

    @property
    def where(self) -> str:
        """The path of the module in the model, or its line where there is none."""
        add = module_path(self.mlp.add)
        inside = [p.split(".") for n in self.mlp.nodes if (p := module_path(n))]
        own = ".".join(common[0] for parts in zip(*inside, strict=False) if len(common := tuple(set(parts))) == 1)
        # a sum may be taken at the entry of the next block
        return (add if add and f"{own}.".startswith(f"{add}.") else own) or source_line(self.mlp.term)

    def attention_op(self) -> Node | None:
        """The block's attention op, if it has exactly one."""
        ops = [n for n in self.attention.nodes if n.target is SDPA] if self.attention is not None else []
        return ops[0] if len(ops) == 1 else None

    def gated(self) -> Node | None:
        """What the last linear layer of a mixer reads, [B, N, D], if it ends in one."""
        linears = [n for n in self.mlp.nodes if n.target in LINEAR and _reaches(n, self.mlp.term)]
        gated = linears[0].args[0] if linears and self.mlp.kind == "mixer" else None
        if not isinstance(gated, Node) or (sizes_of(gated) or ())[:-1] != (sizes_of(self.mlp.stream) or ())[:-1]:
            return None
        return gated


def module_path(node: Node) -> str:
    """`blocks.3.mlp`, the innermost module that a node was captured in."""
    stack: Any = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(list(stack.values()))), "")


def find_branches(gm: GraphModule) -> list[Branch]:
    """All residual branches in topological order; of nested ones the inner."""
    order = positions(gm)
    above = ancestors(gm)
    found: list[Branch] = []
    for node in gm.graph.nodes:
        if not _is_sum(node):
            continue
        terms = _terms(node)
        stream = stream_of(node, order, above)
        if stream is None:
            continue
        inner = _inner_sums(node)
        spans = {t: _between(gm, stream, t, above, order) for t in _computed(terms, stream, above)}
        for term in _joined(node, spans, above, order):
            nodes = spans[term] if term in spans else _between(gm, stream, term, above, order)
            inside = [b for b in found if b.add in nodes]
            if any(b.whole and not _part_of(b, stream, term, nodes, order) for b in inside):
                continue  # a long skip around whole blocks
            kind, reason, at = _kind(gm, stream, term, nodes)
            if kind:
                # (x + attention) + mlp is one sum
                found = [b for b in found if b not in inside and not (b.term is term and b.add in inner)]
                found.append(Branch(kind, stream, term, node, nodes, reason, at))
    sequences = {sizes for b in found if (sizes := _flat(b)) and _mixes_tokens(gm, b)}
    return [b for b in found if not (sizes := _flat(b)) or sizes in sequences]


def _part_of(branch: Branch, stream: Node, term: Node, nodes: frozenset[Node], order: dict[Node, int]) -> bool:
    """Whether a branch is no layer but a part of the attention around it: what makes its queries and keys.

    The attention is none of its own, and its sum is no stream: the term is computed from the stream past it as well.
    """
    attention = {n for n in nodes if n.target is SDPA}
    if not attention or attention & branch.nodes or branch.kind != "mlp":
        return False
    past = {stream}
    for n in sorted(nodes - {branch.add}, key=order.__getitem__):
        if not past.isdisjoint(n.all_input_nodes):
            past.add(n)
    return term in past


def _flat(branch: Branch) -> tuple[Any, ...]:
    """The sizes of a stream [N, C] without a dimension for samples, () where it has one."""
    sizes = sizes_of(branch.stream) or ()
    return sizes if len(sizes) == 2 and not any(s.free_symbols for s in sizes) else ()


def _mixes_tokens(gm: GraphModule, branch: Branch) -> bool:
    """Whether a branch lets the entries of [N, C] meet; those that never meet are samples."""
    layout, batch = stream_layout(branch.stream)
    axis = analyse(gm, branch.stream, layout, batch, within=branch.nodes)
    return mixing(axis, branch.nodes) is not None or (branch.kind == "attention" and bool(axis.dense))


def find_blocks(gm: GraphModule) -> list[Block]:
    """The blocks of a graph; see `blocks_of`."""
    return blocks_of(find_branches(gm))


def blocks_of(branches: Sequence[Branch]) -> list[Block]:
    """Block i is the i-th MLP branch in topological order, with the attention (or other mixing) branch it follows.

    Where there is no MLP, it is the i-th branch that mixes tokens and through which rules carry them.
    """
    blocks: list[Block] = []
    mlps = [b for b in branches if b.kind == "mlp"]
    mixers = [b for b in branches if b.kind == "mixer" and b.whole]
    free = [b for b in branches if b.kind == "attention" or (mlps and b.kind == "mixer")]
    for mlp in mlps or mixers:
        before = [a for a in free if a.add is mlp.add or _reaches(a.add, mlp.stream)]
        attention = before[-1] if before else None
        if attention is not None:
            free.remove(attention)
        blocks.append(Block(len(blocks), mlp, attention, len(mlps or mixers)))
    return blocks


def block_before(blocks: Sequence[Block], block: Block) -> Block | None:
    """The block whose output is this one's entry, norms and added constants between them aside."""
    return next((b for b in reversed(blocks[: block.index]) if _reaches(b.output, block.entry)), None)


def positions(gm: GraphModule) -> dict[Node, int]:
    """The bit of each node in the sets of `ancestors`."""
    return {node: i + 1 for i, node in enumerate(gm.graph.nodes)}


def stream_of(node: Node, order: dict[Node, int], above: dict[Node, int]) -> Node | None:
    """The term of a sum that the other terms are computed from, if the node is such a residual sum."""
    if not _is_sum(node):
        return None
    terms = _terms(node)
    # the term itself first: a scaled value that goes on as it is, is a stream like any other
    for term, stream in [*((t, t) for t in terms), *((t, unscaled(t)) for t in terms)]:
        others = _computed(terms, term, above)
        if others and all(above[u] >> order[stream] & 1 for u in others):
            return stream
    return None


def _is_sum(node: Node) -> bool:
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return False
    return all(isinstance(a, Node) and isinstance(a.meta.get("val"), torch.Tensor) for a in node.args)


def _terms(node: Node) -> list[Node]:
    """The terms of a sum, before casts (a stream kept in float32), and through sums that nothing else reads:
    x + (attention + mlp)."""
    terms: list[Node] = []
    for a in node.args:
        assert isinstance(a, Node)
        terms += _terms(a) if _is_inner(a, node) else [_uncast(a)]
    return terms


def _joined(
    node: Node, spans: dict[Node, frozenset[Node]], above: dict[Node, int], order: dict[Node, int]
) -> list[Node]:
    """The terms that are branches of their own; of those that share their work (a low-rank adapter beside the
    layer that it adapts), their sum.

    Args:
        node: the residual sum.
        spans: each of its computed terms with what lies on the way to it from the stream.
    """
    joined: list[Node] = []
    for a in node.args:
        assert isinstance(a, Node)
        if not _is_inner(a, node):
            joined += [t for t in [_uncast(a)] if t in spans]
            continue
        parts = _terms(a)
        shared = frozenset.intersection(*(spans.get(t, frozenset()) for t in parts))
        joined += [a] if _works(shared, above, order) else _joined(a, spans, above, order)
    return joined


def _works(nodes: frozenset[Node], above: dict[Node, int], order: dict[Node, int]) -> bool:
    """Whether more than a norm and one linear layer is among these ops: something not linear behind a linear layer."""
    linears = sum(1 << order[n] for n in nodes if n.target in LINEAR)
    return any(above[n] & linears for n in nodes if n.target in {SDPA, *SOFTMAX} or _bends(n))


def _bends(node: Node) -> bool:
    """An activation: acts on each entry, and not linearly."""
    passes_on = getattr(node.target, "overloadpacket", None) in PASS_ON
    return elementwise(node.target) and node.target not in AFFINE and not passes_on


def _uncast(node: Node) -> Node:
    while node.target in CASTS:
        node = node.all_input_nodes[0]
    return node


def unscaled(node: Node) -> Node:
    """The stream x of a term a * x, where a sum weighs its stream and its branch by numbers."""
    while node.target in CASTS or (node.target in SCALES and not isinstance(node.args[1], Node)):
        node = node.all_input_nodes[0]
    return node


def _is_inner(a: Node, node: Node) -> bool:
    return _is_sum(a) and len(a.users) == 1 and sizes_of(a) == sizes_of(node)


def _inner_sums(node: Node) -> set[Node]:
    """The sums that `_terms` looks through."""
    inner = {a for a in node.args if isinstance(a, Node) and _is_inner(a, node)}
    return inner.union(*(_inner_sums(a) for a in inner))


def _computed(terms: list[Node], stream: Node, above: dict[Node, int]) -> list[Node]:
    """The other terms that are no mere constants: those computed from an input of the model."""
    return [t for t in terms if t is not stream and above[t] & 1]


def ancestors(gm: GraphModule) -> dict[Node, int]:
    """For each node what it is computed from, as bits: bit 0 the data of an input, bit i + 1 node i."""
    above: dict[Node, int] = {}
    bit: dict[Node, int] = {}
    for i, node in enumerate(gm.graph.nodes):
        bits = 1 if node.op == "placeholder" else 0
        for n in node.all_input_nodes:
            bits |= above[n] | bit[n]
        if node.target in LIKE or not isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
            bits &= ~1  # a size does not depend on what is in the image
        above[node], bit[node] = bits, 1 << (i + 1)
    return above


def _between(
    gm: GraphModule, stream: Node, term: Node, above: dict[Node, int], order: dict[Node, int]
) -> frozenset[Node]:
    """The nodes on a path from the stream to the term, the term included."""
    mine = above[term] | 1 << order[term]
    start = 1 << order[stream]
    span = itertools.takewhile(lambda n: n is not term, iter(_after(stream)))
    return frozenset([n for n in span if above[n] & start and mine >> order[n] & 1] + [term])


def _convolutions(stream: Node) -> str:
    over = stream.meta["val"].dim() - 2
    alone = (
        "" if over == 2 else f" over {over} dimensions: only [batch, channels, rows, columns] can lose rows and columns"
    )
    return f"a convolution branch{alone}"


def _after(node: Node) -> Any:
    while (node := node.next).op != "root":
        yield node


def _kind(gm: GraphModule, stream: Node, term: Node, nodes: frozenset[Node]) -> tuple[str, str, Node | None]:
    """What a branch is, why its tokens are not carried, and the op that this is about."""
    targets = [n.target for n in nodes]
    if SDPA in targets:
        return "attention", "", None
    if any(t in SOFTMAX for t in targets) and sum(t in PRODUCTS for t in targets) >= 2:
        return "attention", "its attention is not in a form that can be lowered", None
    linears = sum(t in LINEAR for t in targets)
    if linears == 0:
        return ("conv", _convolutions(stream), None) if any(t in CONV for t in targets) else ("", "", None)
    try:
        layout, batch = stream_layout(stream)
        axis = analyse(gm, stream, layout, batch, within=nodes)
    except Refusal as refusal:
        return "mixer", refusal.reason, next((n for n in gm.graph.nodes if n.name == refusal.node_name), None)
    if axis.dense:
        node, reason = next(iter(axis.dense.items()))
        return "mixer", f"{node.target}: {reason}", node
    if axis.layouts.get(term) != layout:
        return "mixer", "the branch does not end in the layout of the stream", term
    if mixing(axis, nodes) is not None:
        return "mixer", "", None
    return ("mlp" if linears >= 2 else ""), "", None


def _reaches(add: Node, stream: Node) -> bool:
    """Whether a stream value is a sum, or that sum after norms and added constants."""
    while True:
        if stream is add:
            return True
        inputs = [n for n in stream.all_input_nodes if sizes_of(n) == sizes_of(stream)]
        if len(inputs) != 1 or not (stream.target in NORMS or elementwise(stream.target)):
            return False
        stream = inputs[0]


def tokens_of(stream: Node) -> int | None:
    """Tokens of a residual stream, or None where it has no dimension of its own for them."""
    try:
        layout, _ = stream_layout(stream)
    except Refusal:
        return None
    tokens = sequence_in(layout)
    return tokens.dense if tokens is not None else None
