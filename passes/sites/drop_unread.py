"""Nothing is computed for positions that nobody reads: the class token's MLP alone, where only it goes to the head.

A selection of tokens of an op that treats them one by one is that op on the selection. So selections move up, over
residual sums and into the queries of attention, whose keys and values stay those of every token.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.axes.backward import Made, made_of
from passes.axes.reads import Picked, Reads, analyse, at_picks, parts_of, picks_of
from passes.graph.aliasing import writes
from passes.graph.base import CompileError, Pass, PassResult, Skip
from passes.graph.cost import count
from passes.graph.layout import Batch, Layout, Prunable, Tokens, expr, plain, sequences, tokens_in
from passes.graph.ops import argument, shape_of
from passes.graph.splice import splice
from passes.sites.at_positions import ORIGIN, AtPositions

aten = torch.ops.aten
_WAY_OUT = "results are right, without that saving; optimize(drop_unread=False) does not try it"
SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class DropUnread(Pass):
    """Computes what lies behind the last mixing of tokens for the tokens that are read alone.

    Exact up to the order of float sums. What writes in place anywhere, draws random numbers, or is read at more than
    half of its positions is left alone.
    """

    def call(self, gm: GraphModule) -> PassResult:
        graph = gm.graph
        if any(writes(node) for node in graph.nodes):
            return PassResult(gm)  # a selection made earlier would not see what is written later
        batch = _batch(gm)
        _sizes_of_inputs(gm)
        reads = analyse(graph, batch)
        while any(_open(gm, node, reads) for node in reads.layouts):
            graph.eliminate_dead_code()
            reads = analyse(graph, batch)
        cost = count(gm).by_node
        reads.keep(lambda n: n in cost and cost[n].macs > 0)
        emit = AtPositions(gm, reads.made, reads.picks)
        try:
            emit.emit()
        except CompileError as error:
            reason = f"unread tokens are computed: {error}"
            return PassResult(gm, skips=(Skip.at(next(iter(reads.made)), reason, _WAY_OUT),))
        emit.note()
        for node in emit.twins:
            for user in [u for u in node.users if u not in reads.made]:
                _pick_from_few(emit, user, node, reads.layouts[node])
        return PassResult(gm, rewrites=len(emit.twins))


def _batch(gm: GraphModule) -> Batch:
    """The factor of samples: the one symbol that an input's first size is."""
    for node in gm.graph.find_nodes(op="placeholder"):
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and val.dim() and not isinstance(val.shape[0], int):
            size = expr(val.shape[0])
            return Batch(size / (sequences(size) or 1))
    return Batch(expr(1))


def _sizes_of_inputs(gm: GraphModule) -> None:
    """Reads the number of samples off an input, so that no value stays only to be asked for it."""
    inputs = gm.graph.find_nodes(op="placeholder")
    tensors = [n for n in inputs if isinstance(n.meta.get("val"), torch.Tensor)]
    known = {expr(s): (n, d) for n in tensors for d, s in enumerate(shape_of(n)) if isinstance(s, torch.SymInt)}
    for node in gm.graph.find_nodes(op="call_function", target=aten.sym_size.int):
        size = node.meta.get("val")
        if isinstance(size, torch.SymInt) and expr(size) in known and node.args[0] not in inputs:
            node.args = known[expr(size)]


def _pick_from_few(emit: AtPositions, user: Node, node: Node, layout: Layout) -> None:
    """Lets an op that picks positions of a value pick them from the few that there are."""
    for part, picked in _parts(user, node).items():
        _replace(emit, part, node, layout, picked)


def _parts(user: Node, node: Node) -> dict[Node, Picked]:
    """By value what is picked of another by this op, where it picks; empty where it does not."""
    picked = picks_of(user, node)
    return {} if picked is None else parts_of(user) or {user: picked}


def _replace(emit: AtPositions, part: Node, node: Node, layout: Layout, picked: Picked) -> None:
    dim = picked.dim
    with emit.graph.inserting_before(part):
        new = emit.value(node, layout, picked.picks)
        if picked.dropped:
            new = splice(emit.graph, ORIGIN, lambda x: x.squeeze(dim), new)
    part.replace_all_uses_with(new)


def _open(gm: GraphModule, node: Node, reads: Reads) -> bool:
    """Rewrites, at equal cost, what keeps a selection of `node` from moving further up; False where nothing does."""
    return _write_causal_mask(gm, node, reads) or _split_projection(gm, node, reads)


def _write_causal_mask(gm: GraphModule, node: Node, reads: Reads) -> bool:
    """Causal attention as a mask, of which a query can read its row."""
    if node.target is not SDPA or not argument(node, "is_causal") or argument(node, "attn_mask") is not None:
        return False
    before = node.args, node.kwargs
    query, key = node.args[:2]

    def mask(q: Tensor, k: Tensor) -> Tensor:
        return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()

    with gm.graph.inserting_before(node):
        causal = splice(gm.graph, ORIGIN, mask, query, key)
    node.args = (*node.args[:3], causal, argument(node, "dropout_p"), False)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa")}
    if at_picks(node, reads.layouts[node], reads.picks[node], reads.batch) is None:
        node.args, node.kwargs = before
        return False
    return True


def _split_projection(gm: GraphModule, node: Node, reads: Reads) -> bool:
    """One linear layer for queries, keys and values as a layer for each: then the queries can be few."""
    at = node.args[0] if node.args else None
    source = at.args[0] if node.target is operator.getitem and isinstance(at, Node) else at
    if not isinstance(source, Node) or source in reads.made:
        return False
    parts = {part: picked for user in source.users for part, picked in _parts(user, source).items()}
    picked = parts.get(node)
    whole = all(_parts(user, source) for user in source.users)
    if picked is None or not whole or any(p.dim != picked.dim or p.picks.index for p in parts.values()):
        return False
    size = shape_of(source)[picked.dim]
    over = (Tokens((Prunable(int(size)),)),)
    if sum(p.picks.count for p in parts.values()) > size or picked.picks.count == size:
        return False
    layout = tuple(over if d == picked.dim else plain(s, reads.batch) for d, s in enumerate(shape_of(source)))
    made: dict[Node, Made] = {}
    if not _from_linear(source, layout, reads.batch, made):
        return False
    for part, what in parts.items():
        emit = AtPositions(gm, made, dict.fromkeys(made, what.picks))
        try:
            emit.emit()
        except CompileError:
            return False
        emit.note()
        _replace(emit, part, source, layout, what)
    return True


def _from_linear(node: Node, layout: Layout, batch: Batch, made: dict[Node, Made]) -> bool:
    """Whether some positions of a value are channels of linear layers, through ops that nothing else reads."""
    how = made_of(node, layout, batch)
    if how is None:
        return node.op == "get_attr"
    made[node] = how
    if node.target is aten.linear.default:
        return bool(tokens_in(layout[-1]))
    alone = all(user in made for n in how.inputs for user in n.users if n.op != "get_attr")
    return alone and all(_from_linear(n, own, batch, made) for n, own in how.inputs.items())
