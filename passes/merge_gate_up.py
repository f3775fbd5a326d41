"""Compute an MLP's gate and up projections by one linear.

Before:   mul(act(linear(x, w_gate)), linear(x, w_up)), act pointwise (silu, gelu written out, ...)
After:    gate, up = split(linear(x, concat(w_gate, w_up)), [..]); mul(act(gate), up)
Applies:  both linears read the same x; both have a bias or neither has; equal dtypes
Why:      x is read once, and a fused activation later finds gate and up side by side
Order:    after no-op-elimination; before lower-linear. Exact because a column of llmc.linear does not depend on its neighbours
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from llmc.passes import graph as G
from llmc.passes.base import Numerics, Pass, PassContext, PassResult, Reject
from llmc.passes.merging import behind_lora, cannot_merge, merge

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)


@dataclass(frozen=True)
class MergeGateUp(Pass):
    name: ClassVar[str] = "merge-gate-up"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        matches = 0
        refusals: Counter[str] = Counter()
        for product in [n for n in gm.graph.nodes if G.is_op(n, aten.mul.Tensor)]:
            pair = _gate_and_up(product)
            if pair is None:
                continue
            reject = self.applies(*pair)
            if reject is not None:
                refusals[reject.reason] += 1
                continue
            merge(gm, ctx, pair, "gate_up_merged")
            matches += 1
        if matches:
            G.erase_dead(gm)
        return PassResult(changed=matches > 0, matches=matches, refusals=refusals)

    def applies(self, gate: Node, up: Node) -> Reject | None:
        """Whether two linears multiplied with each other can be one."""
        if not G.same_size(G.val(gate).shape[-1], G.val(up).shape[-1]):
            return Reject("gate and up differ in width", (G.val(gate).shape[-1], G.val(up).shape[-1]))
        return cannot_merge([gate, up])


def _gate_and_up(product: Node) -> tuple[Node, Node] | None:
    """The two linears of a gated product, the activated one first; None if the product is not one."""
    for gated, plain in (product.args, G.args_of(product)[::-1]):
        up, gate = behind_lora(_behind_casts(plain)), _behind_activation(gated)
        if gate is not None and G.is_op(up, aten.linear.default) and gate is not up and behind_lora(_behind_casts(gated)) is not gate:
            return gate, up
    return None


def _behind_casts(value: Any) -> Any:
    while G.is_op(value, *_CASTS):
        value = G.args_of(value)[0]
    return value


def _behind_activation(value: Any) -> Node | None:
    """The one linear that a value is computed from by pointwise ops of this linear and of numbers; None if there is none."""
    found: set[Node] = set()
    pending = [value]
    while pending:
        node = behind_lora(pending.pop())
        if G.is_op(node, aten.linear.default):
            found.add(node)
            continue
        if not isinstance(node, Node) or not isinstance(node.target, OpOverload):
            return None
        if torch.Tag.pointwise not in node.target.tags and not G.is_op(node, *_CASTS):
            return None
        pending.extend(node.all_input_nodes)
    return found.pop() if len(found) == 1 else None
