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
        elif not G.is_op(node, G.ATTENTION, aten.addmm.default, aten.mm.default):
            pending.extend(n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor | list | tuple))
    return found


def merge(gm: GraphModule, ctx: PassContext, linears: Sequence[Node], label: str) -> None:
    """Replace linears that `cannot_merge` allows by one, whose weight is the concatenation of theirs, and a split.

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
        split = G.call(gm, aten.split_with_sizes.default, (merged, sizes, -1))
        parts = [G.call(gm, operator.getitem, (split, i)) for i in range(len(sizes))]
    users: set[Node] = set()
    for linear, part in zip(linears, parts, strict=True):
        users |= set(linear.users)
        linear.replace_all_uses_with(part)
        gm.graph.erase_node(linear)
    G.repropagate(gm, users)


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
