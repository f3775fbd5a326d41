"""Choose a token's experts by one op.

Before:   topk(softmax(logits, -1, f32), k), perhaps divided by its sum; or values, ids = topk(logits, k) and softmax(values)
After:    llmc.moe_route(logits, k, softmax_first, renormalise, wide)
Applies:  the k largest of the last dimension of [T, E]; nobody else reads the softmax before, or the values before the softmax
Why:      a GPU's plan has kernels alone, and torch's topk is a library call; equals are broken one way, by the lower id
Order:    anywhere; at every level of a GPU, since without it a mixture of experts has no plan. Not for CPUs, which have no such kernel
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
class Routing:
    """A choice of experts. before: the softmax over all of them; after: that over the chosen ones; one of the two is None.

    divided: the chosen weights by their sum, where nothing else reads them.
    """

    topk: Node
    logits: Node
    before: Node | None
    after: Node | None
    divided: Node | None
    wide: bool


@dataclass(frozen=True)
class LowerMoeRoute(NodePass[Routing]):
    name: ClassVar[str] = "lower-moe-route"
    numerics: ClassVar[Numerics] = Numerics.CLOSE  # softmax by another kernel, in fp32

    def find(self, node: Node, ctx: PassContext) -> Routing | Reject | None:
        if not G.is_op(node, aten.topk.default):
            return None
        if G.argument(node, 2, "dim", -1) not in (-1, 1) or not G.argument(node, 3, "largest", True):
            return Reject("not the largest of the last dimension", node.name)
        scores = G.args_of(node)[0]
        if len(G.val(scores).shape) != 2:
            return Reject("the scores are not [tokens, experts]", tuple(G.val(scores).shape))
        if _is_softmax(scores):
            if len(scores.users) > 1:
                return Reject("something else reads the softmax", scores.name)
            if G.val(scores).dtype != torch.float32:
                return Reject("the softmax is not in fp32", G.val(scores).dtype)
            return Routing(topk=node, logits=G.args_of(scores)[0], before=scores, after=None, divided=_divided(_values(node)), wide=True)
        values = _values(node)
        readers = [reader for value in values for reader in value.users]
        if len(readers) != 1 or not _is_softmax(readers[0]):
            return Reject("no softmax before or after the choice", node.name)
        dtype = G.val(readers[0]).dtype
        if dtype not in (torch.float32, G.val(scores).dtype):
            return Reject("the softmax has another dtype than the scores", dtype)
        wide = dtype == torch.float32
        return Routing(topk=node, logits=scores, before=None, after=readers[0], divided=None, wide=wide)

    def rewrite(self, gm: GraphModule, ctx: PassContext, match: Routing) -> None:
        k = G.args_of(match.topk)[1]
        with gm.graph.inserting_before(match.topk):
            arguments = (match.logits, k, match.before is not None, match.divided is not None, match.wide)
            routed = G.call(gm, overload("moe_route"), arguments)
            parts = [G.call(gm, operator.getitem, (routed, number)) for number in range(2)]
        if match.after is not None:
            G.substitute(gm, match.after, parts[0])
        if match.divided is not None:
            G.substitute(gm, match.divided, parts[0])
        for user in list(match.topk.users):
            if user.users:
                G.substitute(gm, user, parts[G.args_of(user)[1]])


def _values(topk: Node) -> list[Node]:
    """The reads of what a choice found, as against where."""
    return [user for user in topk.users if G.is_op(user, operator.getitem) and G.args_of(user)[1] == 0]


def _divided(values: list[Node]) -> Node | None:
    """The one read of the chosen weights divided by their sum over the choices; None if something else reads them."""
    if len(values) != 1 or len(values[0].users) != 2:
        return None
    sums = [user for user in values[0].users if G.is_op(user, aten.sum.dim_IntList)]
    quotients = [user for user in values[0].users if G.is_op(user, aten.div.Tensor)]
    if len(sums) != 1 or len(quotients) != 1 or list(sums[0].users) != quotients or G.args_of(quotients[0]) != (values[0], sums[0]):
        return None
    over, keep, dtype = (G.argument(sums[0], place, name) for place, name in ((1, "dim"), (2, "keepdim"), (3, "dtype")))
    return quotients[0] if over in ([-1], [1]) and keep and dtype is None else None


def _is_softmax(value: object) -> bool:
    """Over the last of two dimensions."""
    return G.is_op(value, aten.softmax.int, aten._softmax.default) and G.args_of(value)[1] in (-1, 1)
