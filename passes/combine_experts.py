"""Weigh and sum what a token's experts give by one op.

Before:   sum(view(y [T * C, N] * unsqueeze(reshape(weights [T, C], [-1]), -1), [T, C, N]), 1), perhaps cast back to y's dtype
          or of index(view(...), [rows]), some tokens' rows alone
After:    llmc.moe_combine(y, weights), of which the rows are taken behind it
Applies:  the result has y's dtype, and nobody else reads a value in between
Why:      one kernel that reads y once, and a sum whose order does not depend on how a generated kernel cuts it
Order:    after lower-moe-route; for GPUs alone, which have the kernel
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from llmc.kernels.ops import overload
from llmc.passes import graph as G
from llmc.passes.base import NodePass, Numerics, PassContext, Reject

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default)


@dataclass(frozen=True)
class Combination:
    """y: [T * C, N]; weights: [T, C]; rows: of the tokens wanted, None: all; result: what is replaced, [T or rows, N]."""

    y: Node
    weights: Node
    rows: Node | None
    result: Node


@dataclass(frozen=True)
class CombineExperts(NodePass[Combination]):
    name: ClassVar[str] = "combine-experts"
    numerics: ClassVar[Numerics] = Numerics.CLOSE  # rounds once, after the sum, which is in fp32

    def find(self, node: Node, ctx: PassContext) -> Combination | Reject | None:
        if not G.is_op(node, aten.sum.dim_IntList) or G.args_of(node)[1] not in ([1], [-2]) or G.argument(node, 2, "keepdim", False):
            return None
        picked = G.args_of(node)[0]
        rows = G.args_of(picked)[1][0] if G.is_op(picked, aten.index.Tensor) and len(G.args_of(picked)[1]) == 1 else None
        view = picked if rows is None else G.args_of(picked)[0]
        product: Any = G.args_of(view)[0] if G.is_op(view, *_VIEWS) else None
        if not G.is_op(product, aten.mul.Tensor) or len(G.val(view).shape) != 3:
            return None
        y, column = G.args_of(product)
        weights = _flattened(column)
        if weights is None or len(G.val(y).shape) != 2:
            return None
        if [G.size_expr(size) for size in G.val(weights).shape] != [G.size_expr(size) for size in G.val(view).shape[:2]]:
            return Reject("the weights are not [tokens, choices]", weights.name)
        if any(len(inner.users) > 1 for inner in (picked, view, product)):
            return Reject("something else reads the weighted rows", node.name)
        result = node
        if G.val(node).dtype != G.val(y).dtype:
            casts = [user for user in node.users if G.is_op(user, aten.to.dtype) and G.val(user).dtype == G.val(y).dtype]
            if len(casts) != 1 or len(node.users) != 1:
                return Reject("the sum is not brought back to the dtype of the rows", G.val(node).dtype)
            result = casts[0]
        return Combination(y=y, weights=weights, rows=rows, result=result)

    def rewrite(self, gm: GraphModule, ctx: PassContext, match: Combination) -> None:
        with gm.graph.inserting_before(match.result):
            new = G.call(gm, overload("moe_combine"), (match.y, match.weights))
            if match.rows is not None:
                new = G.call(gm, aten.index.Tensor, (new, [match.rows]))
        G.substitute(gm, match.result, new)


def _flattened(column: Any) -> Node | None:
    """The [T, C] that unsqueeze(reshape(it, [-1]), -1) shows as a column."""
    if not G.is_op(column, aten.unsqueeze.default) or G.args_of(column)[1] not in (1, -1):
        return None
    row = G.args_of(column)[0]
    if not G.is_op(row, *_VIEWS) or len(G.val(row).shape) != 1:
        return None
    weights: Node = G.args_of(row)[0]
    return weights if len(G.val(weights).shape) == 2 else None
