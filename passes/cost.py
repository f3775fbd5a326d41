"""What a graph would cost to run, predicted: launches and bytes moved of one step, by counting, not by measuring.

Counted with every open size at 64: tokens, and rows that want logits. A call that is neither a view nor pointwise is a launch: it reads
its tensors and writes
its result. Pointwise calls and reductions that feed each other, with no other call between them, are one launch together, as a fusing
compiler makes them; of what lies inside such a group nothing is moved. KV caches, the adapters of LoRA and lookups count as what is read
of them: nothing, nothing, and the rows.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from llmc.passes import graph as G

aten = torch.ops.aten

TOKENS = 64  # what every symbol that counts tokens, rows or blocks stands for
_VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.transpose.int,
    aten.permute.default, aten.t.default, aten.slice.Tensor, aten.select.int, aten.expand.default, aten.split_with_sizes.default,
    aten.split.Tensor, aten.chunk.default, aten.alias.default, aten.detach.default, aten.flatten.using_ints, aten.sym_size.int,
    operator.getitem,
}  # fmt: skip
_FUSED = {
    aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.cat.default, aten.stack.default, aten.clone.default,
    aten.contiguous.default, aten.mean.dim, aten.sum.dim_IntList, aten.softmax.int, aten.index_select.default, aten.layer_norm.default,
    aten.embedding.default, aten.repeat_interleave.self_int,
}  # fmt: skip
_LOOKUPS = {aten.index_select.default, aten.embedding.default, aten.index.Tensor}
_OUR_LOOKUPS = ("llmc.embedding.default", "llmc.quantized_embedding.default")
_ANGLES = slice(4, 6)  # arguments cos and sin of rope_kv_write, rows by position
_CACHES = ("k_cache", "v_cache", "lora_pool")


@dataclass(frozen=True)
class Cost:
    """Predicted of one step."""

    launches: int
    nbytes: int


def predicted(gm: GraphModule) -> Cost:
    """The cost of a graph."""
    group = _groups(gm)
    launches, moved = len(set(group.values())), 0
    for node in _calls(gm):
        if node not in group and node.target not in _VIEWS:
            launches += 1
            moved += _bytes(node) + sum(_read(node, n) for n in node.all_input_nodes)
    seen: set[tuple[Node, Node]] = set()
    for node, root in group.items():
        for view in node.all_input_nodes:
            if group.get(_base(view)) is not root and (view, root) not in seen:
                seen.add((view, root))  # read once by a group, however many of its calls want it
                moved += _read(node, view)
        if _leaves(node, group):
            moved += _bytes(node)
    return Cost(launches=launches, nbytes=moved)


def timeline(gm: GraphModule) -> list[tuple[Node, int]]:
    """Each call that leaves a value, in order, with the bytes of such values alive behind it, predicted: weights, caches and inputs are
    not counted, and a value lives from its call to its last reader."""
    group, place = _groups(gm), {node: number for number, node in enumerate(gm.graph.nodes)}
    kept = [n for n in _calls(gm) if n.target not in _VIEWS and (n not in group or _leaves(n, group))]
    dies = {node: max([place[node], *(place[user] for user in _readers(node))]) for node in kept}
    found: list[tuple[Node, int]] = []
    living: list[Node] = []
    for node in kept:
        living = [n for n in living if dies[n] >= place[node]] + [node]
        found.append((node, sum(map(_bytes, living))))
    return found


def _calls(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor | tuple | list)]


def _groups(gm: GraphModule) -> dict[Node, Node]:
    """Each fused call -> the one that stands for its group: those that share a depth, the number of other calls on the way to them."""
    depth: dict[Node, int] = {}
    group: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        while group[node] is not node:
            node = group[node]
        return node

    for node in _calls(gm):
        inputs = [_base(n) for n in node.all_input_nodes]
        depth[node] = max((depth.get(n, 0) + (not _is_fused(n)) for n in inputs if n.op == "call_function"), default=0)
        if node.target in _VIEWS or not _is_fused(node):
            continue
        group[node] = node
        for before in inputs:
            if before in group and depth[before] == depth[node]:
                group[root(before)] = root(node)
    return {node: root(node) for node in group}


def _leaves(node: Node, group: dict[Node, Node]) -> bool:
    """Whether somebody outside its group reads a fused call."""
    return any(group.get(user) is not group[node] for user in _readers(node))


def _is_fused(node: Node) -> bool:
    if node.op != "call_function":
        return False
    return node.target in _FUSED or (isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags)


def _base(node: Node) -> Node:
    """What a chain of views shows."""
    while node.op == "call_function" and node.target in _VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _readers(node: Node) -> list[Node]:
    """The calls, or the output, that read a value directly or through views."""
    found: list[Node] = []
    for user in node.users:
        found += _readers(user) if user.op == "call_function" and user.target in _VIEWS else [user]
    return found


def _read(reader: Node, view: Node) -> int:
    value = _base(view)
    if value.op == "placeholder" and str(value.target).startswith(_CACHES):
        return 0
    if (reader.target in _LOOKUPS or G.is_op(reader, *_OUR_LOOKUPS)) and G.is_constant(value):
        return _bytes(reader)
    if G.is_op(reader, "llmc.rope_kv_write.default") and view in reader.args[_ANGLES] and G.is_constant(value):
        return TOKENS * _bytes(value) // int(value.meta["val"].shape[0])  # a row of the cosines and sines per token
    return min(_bytes(view), _bytes(value))  # a slice is less than its base, an expanded row is read once


def _bytes(node: Node) -> int:
    value = node.meta.get("val")
    tensors = value if isinstance(value, tuple | list) else [value]
    return sum(t.element_size() * prod(_size(s) for s in t.shape) for t in tensors if isinstance(t, torch.Tensor))


def _size(size: Any) -> int:
    expression = G.size_expr(size)
    return expression if isinstance(expression, int) else _of_symbols(expression)


@cache
def _of_symbols(expression: Any) -> int:
    return int(expression.subs(dict.fromkeys(expression.free_symbols, TOKENS)))
