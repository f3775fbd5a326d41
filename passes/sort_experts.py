"""Put rows in the order of their experts once per layer, and multiply them tile by tile.

Before:   plain_grouped_linear(repeat_interleave(x, C, 0), w, reshape(ids [T, C], [-1]), None), perhaps + bias[ids];
          plain_grouped_linear(rows [T * C, K], w, the same ids, None)
After:    rows, tile_experts = llmc.moe_sort(ids, E, tile); llmc.moe_linear(x, w, rows, tile_experts, bias, T * C, C or 1)
Applies:  the sizes are numbers, since a tile's height is chosen by them; ids is [T, C] seen as one row
Why:      an expert's matrix is read once for all rows of a tile, not once per row; both matmuls of a layer share one sort
Order:    after lower-plain-experts and lower-moe-route, once per size of a step; a row's bits depend on neither size nor place
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from llmc.kernels.moe import tile_rows
from llmc.kernels.ops import overload
from llmc.passes import graph as G
from llmc.passes.base import NodePass, Numerics, PassContext, Reject

aten = torch.ops.aten
_SORT = "llmc.moe_sort.default"


@dataclass(frozen=True)
class SortedProduct:
    """One matmul of a layer of experts. x: [rows / rows_per_token, K]; ids: [T, C]; result: what is replaced, [rows, N]."""

    x: Node
    weight: Node
    ids: Node
    bias: Node | None
    rows_per_token: int
    result: Node


@dataclass(frozen=True)
class SortExperts(NodePass[SortedProduct]):
    name: ClassVar[str] = "sort-experts"
    numerics: ClassVar[Numerics] = Numerics.CLOSE  # the bias is added before the one rounding, not after it

    def find(self, node: Node, ctx: PassContext) -> SortedProduct | Reject | None:
        if not G.is_op(node, "llmc.plain_grouped_linear.default"):
            return None
        rows, weight, flat, bias = G.args_of(node)
        ids = G.args_of(flat)[0] if G.is_op(flat, aten.reshape.default, aten.view.default) else None
        if ids is None or len(G.val(ids).shape) != 2:
            return Reject("the ids are not [tokens, choices] as one row", node.name)
        if not all(isinstance(size, int) for size in G.val(ids).shape):
            return Reject("the sizes are open", node.name)
        x, repeats = _repeated(rows, int(G.val(ids).shape[1]))
        added = _bias(node, flat) if bias is None else None
        bias, result = added if added is not None else (bias, node)
        return SortedProduct(x=x, weight=weight, ids=ids, bias=bias, rows_per_token=repeats, result=result)

    def rewrite(self, gm: GraphModule, ctx: PassContext, match: SortedProduct) -> None:
        num_rows, num_experts = int(G.val(match.ids).numel()), int(G.val(match.weight).shape[0])
        rows, tile_experts = _sort(gm, match.ids, num_experts, tile_rows(num_rows, num_experts))
        arguments = (match.x, match.weight, rows, tile_experts, match.bias, num_rows, match.rows_per_token)
        with gm.graph.inserting_before(match.result):
            new = G.call(gm, overload("moe_linear"), arguments)
        G.substitute(gm, match.result, new)


def _repeated(rows: Node, choices: int) -> tuple[Node, int]:
    """What every run of `choices` rows repeats, and how often; the rows themselves, once each, where they are no such repeat."""
    if G.is_op(rows, aten.repeat_interleave.self_int) and G.args_of(rows)[1] == choices and G.argument(rows, 2, "dim") == 0:
        return G.args_of(rows)[0], choices
    return rows, 1


def _bias(product: Node, flat: Any) -> tuple[Node, Node] | None:
    """A constant [E, N] of which the rows of the ids are added to a product that nothing else reads, and the sum."""
    if len(product.users) != 1:
        return None
    (added,) = product.users
    if not G.is_op(added, aten.add.Tensor) or added.kwargs.get("alpha", 1) != 1:
        return None
    left, right = G.args_of(added)
    gathered = right if left is product else left
    if not G.is_op(gathered, aten.index.Tensor) or G.args_of(gathered)[1] != [flat]:
        return None
    constant = G.args_of(gathered)[0]
    same = G.is_constant(constant) and len(G.val(constant).shape) == 2 and G.val(constant).dtype == G.val(product).dtype
    return (constant, added) if same else None


def _sort(gm: GraphModule, ids: Node, num_experts: int, tile: int) -> tuple[Node, Node]:
    """The sorted rows of these ids and the experts of their tiles; sorted right behind the ids, once for all that ask."""
    known = [user for user in ids.users if G.is_op(user, _SORT) and G.args_of(user)[1:] == (num_experts, tile)]
    if known:
        parts = {G.args_of(user)[1]: user for user in known[0].users}
        return parts[0], parts[1]
    with G.insert_after(gm.graph, ids):
        sort = G.call(gm, overload("moe_sort"), (ids, num_experts, tile))
    with gm.graph.inserting_after(sort):
        experts = G.call(gm, operator.getitem, (sort, 1))
        rows = G.call(gm, operator.getitem, (sort, 0))
    return rows, experts
