"""Several linears of one input as one linear and a split; shared by the merge passes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from llmc.passes import graph as G
from llmc.passes.base import PassContext, Reject
from llmc.passes.weights import concat

aten = torch.ops.aten


def cannot_merge(linears: Sequence[Node]) -> Reject | None:
    """Why these `aten.linear` calls cannot be one."""
    if len(set(linears)) < len(linears):
        return Reject("they are one linear already", [n.name for n in linears])
    if len({G.args_of(n)[0] for n in linears}) > 1:
        return Reject("the linears read different inputs", [G.args_of(n)[0].name for n in linears])
    weights, biases = [G.args_of(n)[1] for n in linears], [_bias(n) for n in linears]
    if not all(G.is_constant(w) for w in weights) or not all(b is None or G.is_constant(b) for b in biases):
        return Reject("a weight is computed in the graph", [str(w) for w in weights])
    if len({b is None for b in biases}) > 1:
        return Reject("some have a bias and some have none", [n.name for n in linears])
    if len({(G.val(w).dtype, G.val(w).shape[1]) for w in weights}) > 1:
        return Reject("the weights differ in dtype or width", [G.signature(G.val(w)) for w in weights])
    return None


def linears_behind(value: Any) -> list[Node]:
    """The linears a value is computed from, not looking behind them; positions and constants do not count."""
    seen: set[Node] = set()
    found: list[Node] = []
    pending = [value]
    while pending:
        node = pending.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if G.is_op(node, aten.linear.default):
            found.append(node)
        elif G.is_op(node, G.LORA_ADD):
            pending.append(behind_lora(node))
        elif not G.is_op(node, G.ATTENTION, aten.addmm.default, aten.mm.default):
            pending.extend(n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor | list | tuple))
    return found


def behind_lora(value: Any) -> Any:
    """The linear whose result an adapter's term is added to; any other value as it is."""
    return G.args_of(value)[0] if G.is_op(value, G.LORA_ADD) else value


def merge(gm: GraphModule, ctx: PassContext, linears: Sequence[Node], label: str) -> None:
    """Replace linears that `cannot_merge` allows by one, whose weight is the concatenation of theirs, and a split.

    The terms of adapters behind them (add-lora) become one in the same way.

    Args:
        linears: in the order their results stand in the merged result.
        label: what the merged linear is called, in place of q_proj, k_proj, ...
    """
    ordered = sorted(linears)
    sizes = [G.val(G.args_of(n)[1]).shape[0] for n in linears]
    with gm.graph.inserting_before(ordered[0]):
        constants = [_concatenated(gm, ctx, [G.args_of(n)[1] for n in linears], label)]
        if _bias(linears[0]) is not None:
            constants.append(_concatenated(gm, ctx, [_bias(n) for n in linears], label))
        merged = G.call(gm, aten.linear.default, (linears[0].args[0], *constants))
        terms = [_term(n) for n in linears]
        merged = _merged_terms(gm, merged, terms, sizes)
        split = G.call(gm, aten.split_with_sizes.default, (merged, sizes, -1))
        parts = [G.call(gm, operator.getitem, (split, i)) for i in range(len(sizes))]
    users: set[Node] = set()
    for linear, term, part in zip(linears, terms, parts, strict=True):
        last = term or linear
        users |= set(last.users)
        last.replace_all_uses_with(part)
        if term is not None:
            gm.graph.erase_node(term)
        gm.graph.erase_node(linear)
    G.repropagate(gm, users)


def _term(linear: Node) -> Node | None:
    """The adapter's term behind a linear, which is then its only reader."""
    found = [user for user in linear.users if G.is_op(user, G.LORA_ADD) and G.args_of(user)[0] is linear]
    assert not found or len(linear.users) == 1
    return found[0] if found else None


def _merged_terms(gm: GraphModule, merged: Node, terms: Sequence[Node | None], sizes: Sequence[int]) -> Node:
    """The terms of several linears as one of the merged linear; parts without one have offset -1."""
    first = next((term for term in terms if term is not None), None)
    if first is None:
        return merged
    _, x, slots, pool, rank = G.args_of(first)[:5]
    offsets = [-1 if term is None else G.args_of(term)[6][0] for term in terms]
    return G.call(gm, first.target, (merged, x, slots, pool, rank, list(sizes), offsets))  # type: ignore[arg-type]


def _bias(linear: Node) -> Node | None:
    bias: Node | None = G.argument(linear, 2, "bias")
    return bias


def _concatenated(gm: GraphModule, ctx: PassContext, reads: Sequence[Node | None], label: str) -> Node:
    names = [str(r.target) for r in reads if r is not None]
    merged = concat([ctx.weights[name] for name in names])
    return G.constant(gm, ctx.weights, ctx.weights.add(_merged_name(names, label), merged))


def _merged_name(names: Sequence[str], label: str) -> str:
    """model.layers.0.self_attn.q_proj.weight and its like -> model.layers.0.self_attn.<label>.weight"""
    module, dot, parameter = names[0].rpartition(".")
    owner, owner_dot, _ = module.rpartition(".")
    return f"{owner}{owner_dot}{label}{dot}{parameter}"
