"""Hand the matmuls of a mixture of experts to llmc.grouped_linear.

Before:   bmm(w[expert_ids], x as columns) with w [E, N, K], or bmm(x as rows, w[expert_ids]) with w [E, K, N]
After:    llmc.grouped_linear(x, packed w, expert_ids, None, N)
Applies:  w is a constant of x's dtype, read by such matmuls only; the gathered weights are read by nobody else
Why:      the gather copies an expert's whole matrix per token and choice; the kernel reads each expert in place
Order:    beside lower-linear, last of the list
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from llmc.kernels.ops import overload
from llmc.passes import graph as G
from llmc.passes.base import Numerics, Pass, PassContext, PassResult, Reject
from llmc.passes.lower_linear import packed_name
from llmc.passes.weights import pack, transpose

aten = torch.ops.aten

_LOWERED = ("llmc.grouped_linear.default", "llmc.plain_grouped_linear.default")


@dataclass(frozen=True)
class ExpertProduct:
    """One batched matmul with gathered weights. x: [R, K]; ids: int64 [R]; result: the node that is [R, N]."""

    gather: Node
    weights: Any
    ids: Any
    x: Any
    result: Node
    transposed: bool  # stored [E, K, N]


@dataclass(frozen=True)
class LowerExperts(Pass):
    name: ClassVar[str] = "lower-experts"
    numerics: ClassVar[Numerics] = Numerics.CLOSE  # sums in another order than the BLAS that aten.bmm calls

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        matches = 0
        refusals: Counter[str] = Counter()
        for bmm in [n for n in gm.graph.nodes if G.is_op(n, aten.bmm.default) and _gathers(n)]:
            product = self.applies(bmm)
            if isinstance(product, Reject):
                refusals[product.reason] += 1
                continue
            self.lower(gm, ctx, product)
            matches += 1
        if matches:
            G.erase_dead(gm)
        return PassResult(changed=matches > 0, matches=matches, refusals=refusals)

    def applies(self, bmm: Node) -> ExpertProduct | Reject:
        """What a batched matmul with gathered weights computes, or why llmc.grouped_linear cannot take it."""
        product = _product(bmm)
        if product is None:
            return Reject("not one row per gathered matrix", bmm.name)
        dtypes = (G.val(product.x).dtype, G.val(product.weights).dtype)
        if dtypes[0] not in G.KERNEL_DTYPES or dtypes[0] != dtypes[1]:
            return Reject("no kernel for these dtypes", dtypes)
        if len(product.gather.users) > 1:
            return Reject("something else reads the gathered weights", product.gather.name)
        reads = [n for n in bmm.graph.nodes if n.op == "get_attr" and n.target == product.weights.target]
        if any(not _is_gather(user) for read in reads for user in read.users if not G.is_op(user, *_LOWERED)):
            return Reject("something else than an expert matmul reads the weights", product.weights.target)
        return product

    def lower(self, gm: GraphModule, ctx: PassContext, product: ExpertProduct) -> None:
        """Replace a product that `applies` allows."""
        _lower(gm, ctx, product)

    def ensures(self, gm: GraphModule) -> str | None:
        for node in gm.graph.nodes:
            if G.is_op(node, aten.bmm.default) and _gathers(node) and isinstance(self.applies(node), ExpertProduct):
                return f"{node.name} still gathers whole expert matrices"
        return None


def _is_gather(value: Any) -> bool:
    """Whether a value is constant[ids], a row of matrices per id."""
    return G.is_op(value, aten.index.Tensor) and G.is_constant(G.args_of(value)[0]) and len(G.args_of(value)[1]) == 1


def _gathers(bmm: Node) -> bool:
    return any(_is_gather(a) and len(G.val(G.args_of(a)[0]).shape) == 3 for a in G.args_of(bmm))


def _product(bmm: Node) -> ExpertProduct | None:
    left, right = G.args_of(bmm)
    gather, vector, axis = (left, right, 2) if _is_gather(left) else (right, left, 1)
    if not G.is_op(vector, aten.unsqueeze.default) or G.args_of(vector)[1] not in (axis, axis - 3) or len(bmm.users) != 1:
        return None
    (result,) = bmm.users
    if not G.is_op(result, aten.squeeze.dim) or G.args_of(result)[1] not in (axis, axis - 3):
        return None
    ids = G.args_of(gather)[1][0]
    if len(G.val(ids).shape) != 1 or G.val(ids).dtype != torch.int64:
        return None
    return ExpertProduct(gather=gather, weights=G.args_of(gather)[0], ids=ids, x=G.args_of(vector)[0], result=result, transposed=axis == 1)


def _lower(gm: GraphModule, ctx: PassContext, product: ExpertProduct) -> None:
    name = str(product.weights.target)
    entry = transpose(ctx.weights[name], (0, 2, 1)) if product.transposed else ctx.weights[name]
    packed = packed_name(name, product.transposed)
    if packed not in ctx.weights:
        ctx.weights.add(packed, pack(entry))
    with gm.graph.inserting_before(product.result):
        read = G.constant(gm, ctx.weights, packed)
        new = G.call(gm, overload("grouped_linear"), (product.x, read, product.ids, None, entry.shape[1]))
    G.substitute(gm, product.result, new)
