"""Compute equal things once.

Before:   the same op on the same values, twice (each layer widens the same rotary cosines, each reads the same size)
After:    once, the later one's readers reading the first
Applies:  ops that neither write nor draw random numbers, on values and with results that nobody writes to
Why:      folding and merging then see one value instead of one per layer
Order:    after no-op-elimination, which makes equal things look equal; before constant-fold-rope
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from llmc.passes import graph as G
from llmc.passes.base import Numerics, Pass, PassContext, PassResult

_FUNCTIONS = (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    name: ClassVar[str] = "common-subexpressions"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        first: dict[Any, Node] = {}
        matches = 0
        for node in list(gm.graph.nodes):
            if not _may_be_shared(node):
                continue
            key = _key(node)
            known = first.setdefault(key, node)
            if known is not node:
                node.replace_all_uses_with(known)
                gm.graph.erase_node(node)
                matches += 1
        if matches:
            G.erase_dead(gm)
        return PassResult(changed=matches > 0, matches=matches)


def _may_be_shared(node: Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or any(G.writes_to(user, value) for value in (node, *node.all_input_nodes) for user in value.users):
        return False
    if not isinstance(node.target, OpOverload):
        return node.target in _FUNCTIONS
    return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags


def _key(node: Node) -> Any:
    return (node.op, node.target, _hashable(node.args), _hashable(node.kwargs))


def _hashable(value: Any) -> Any:
    """Arguments as a key; the type stands beside each number, for 1, 1.0 and True are equal keys and different arguments."""
    if isinstance(value, dict):
        return tuple((k, _hashable(v)) for k, v in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return value if isinstance(value, Node) else (type(value), repr(value))
