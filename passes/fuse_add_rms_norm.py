"""Add to the residual stream and normalise the sum in one op.

Before:   s = add(x, residual); llmc.rms_norm(s, weight, ...); s is read again further down
After:    normal, s = llmc.add_rms_norm(x, residual, weight, ...)
Applies:  x and residual agree in shape and dtype; the norm reads the sum itself; of several norms of one sum, the first
Why:      the sum is normalised while it is at hand: one read of [tokens, hidden] and one launch fewer, twice a layer
Order:    after fuse-rms-norm, which makes the norms it looks for
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from llmc.kernels.ops import overload
from llmc.passes import graph as G
from llmc.passes.base import NodePass, Numerics, PassContext, Reject

aten = torch.ops.aten


@dataclass(frozen=True)
class SumAndNorm:
    """A sum and the norm that reads it."""

    added: Node
    norm: Node


@dataclass(frozen=True)
class FuseAddRmsNorm(NodePass[SumAndNorm]):
    name: ClassVar[str] = "fuse-add-rms-norm"
    numerics: ClassVar[Numerics] = Numerics.EXACT  # the sum is rounded before it is normalised, as it was

    def find(self, node: Node, ctx: PassContext) -> SumAndNorm | Reject | None:
        norms = [user for user in node.users if G.is_op(user, "llmc.rms_norm.default") and G.args_of(user)[0] is node]
        if not G.is_op(node, aten.add.Tensor) or not norms:
            return None
        if node.kwargs or len(node.args) != 2 or not all(isinstance(a, Node) for a in node.args):
            return Reject("not a plain sum of two tensors", node.name)
        shapes = {(G.val(a).dtype, tuple(map(G.size_expr, G.val(a).shape))) for a in node.args}
        if len(shapes) > 1:
            return Reject("the summands differ in shape or dtype", sorted(map(str, shapes)))
        return SumAndNorm(added=node, norm=min(norms))

    def rewrite(self, gm: GraphModule, ctx: PassContext, match: SumAndNorm) -> None:
        added, norm = match.added, match.norm
        weight, *rest = G.args_of(norm)[1:]
        with gm.graph.inserting_before(added):
            # read here: the norm's own read of its weight may stand further down
            weight = G.constant(gm, ctx.weights, str(weight.target)) if G.is_constant(weight) else weight
            both = G.call(gm, overload("add_rms_norm"), (*added.args, weight, *rest))
            normal, summed = (G.call(gm, operator.getitem, (both, i)) for i in (0, 1))
        G.substitute(gm, norm, normal)
        G.substitute(gm, added, summed)
