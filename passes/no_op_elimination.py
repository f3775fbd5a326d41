"""Erase ops that return their input.

Before:   to(x, f32) of an f32 x; view(x, its own shape); dropout in evaluation; alias, detach, contiguous of a contiguous x; assertions
After:    x
Applies:  the result has the input's shape, strides, dtype and device, and nobody writes to either
Why:      a third of a captured graph is export's noise; what follows matches ops that then stand next to each other
Order:    first
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from llmc.passes import graph as G
from llmc.passes.base import Numerics, Pass, PassContext, PassResult, Reject

aten = torch.ops.aten

_ASSERTIONS = {aten._assert_tensor_metadata.default}
# Copies, views and casts: same shape and strides over the same elements is the same value. A copy counts too, if nobody writes.
_IDENTITIES = {
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default, aten.contiguous.default,
    aten.clone.default, aten.alias.default, aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default,
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default, aten.slice.Tensor,
    aten.permute.default, aten.transpose.int,
}  # fmt: skip


@dataclass(frozen=True)
class NoOpElimination(Pass):
    name: ClassVar[str] = "no-op-elimination"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        matches, before = 0, len(gm.graph.nodes)
        refusals: Counter[str] = Counter()
        outputs = set(G.outputs(gm))
        for node in list(gm.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _ASSERTIONS:
                gm.graph.erase_node(node)
                matches += 1
            elif _returns_its_input(node):
                reject = self.applies(node, outputs)
                if reject is not None:
                    refusals[reject.reason] += 1
                    continue
                node.replace_all_uses_with(G.args_of(node)[0])
                gm.graph.erase_node(node)
                matches += 1
        G.erase_dead(gm)
        return PassResult(changed=len(gm.graph.nodes) != before, matches=matches, refusals=refusals)

    def applies(self, node: Node, outputs: set[Node]) -> Reject | None:
        """Whether an op that returns its input may go."""
        if _written(node) or _written(G.args_of(node)[0]):
            return Reject("somebody writes to it", node.name)
        if node in outputs and G.args_of(node)[0].op != "call_function":
            return Reject("an output would share memory with an input", node.name)
        return None

    def ensures(self, gm: GraphModule) -> str | None:
        left = next((n for n in gm.graph.nodes if n.op == "call_function" and n.target in _ASSERTIONS), None)
        return None if left is None else f"{left.name} asserts metadata that compilation has fixed"


def _returns_its_input(node: Node) -> bool:
    x = G.args_of(node)[0] if node.args else None
    if not isinstance(x, Node):
        return False
    if node.target is aten.dropout.default:
        return G.argument(node, 2, "train") is False
    return node.target in _IDENTITIES and G.signature(G.val(node)) == G.signature(G.val(x))


def _written(node: Node) -> bool:
    """Whether some op writes to this very value."""
    return any(G.writes_to(user, node) for user in node.users)
