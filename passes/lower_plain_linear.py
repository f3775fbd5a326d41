"""Hand every matmul with a weight to llmc.plain_linear, the GPU's, which reads the weight as the checkpoint holds it.

Before:   linear(x, w, bias); addmm(bias, x, w) and mm(x, w) with w [K, N] or transposed in the graph
After:    llmc.plain_linear(x, w, bias), a weight stored [K, N] being transposed once, when it is packed
Applies:  w is a constant of x's dtype (fp32, bf16 or fp16), a matrix; x may have any leading dimensions
Why:      one kernel whose rows have the same bits at every size, and no library call in a plan
Order:    after the merges and the fusions, which match plain linears; for CUDA targets, in place of lower-linear
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from llmc.kernels.ops import overload
from llmc.passes import graph as G
from llmc.passes.base import Numerics, Pass, PassContext, PassResult, Reject
from llmc.passes.lower_linear import MATMULS, operands, refuse_matmul, weights_read
from llmc.passes.weights import transpose


@dataclass(frozen=True)
class LowerPlainLinear(Pass):
    name: ClassVar[str] = "lower-plain-linear"
    numerics: ClassVar[Numerics] = Numerics.CLOSE  # sums in another order than the BLAS that aten.linear calls

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        matches = 0
        refusals: Counter[str] = Counter()
        for node in [n for n in gm.graph.nodes if G.is_op(n, *MATMULS)]:
            if not weights_read(node):
                continue
            reject = self.applies(node)
            if reject is not None:
                refusals[reject.reason] += 1
                continue
            _lower(gm, ctx, node)
            matches += 1
        if matches:
            G.erase_dead(gm)
        return PassResult(changed=matches > 0, matches=matches, refusals=refusals)

    def applies(self, node: Node) -> Reject | None:
        """Whether llmc.plain_linear can take a matmul that reads a weight."""
        return refuse_matmul(node)

    def ensures(self, gm: GraphModule) -> str | None:
        for node in gm.graph.nodes:
            if G.is_op(node, *MATMULS) and weights_read(node) and self.applies(node) is None:
                return f"{node.name} ({node.target}) is still a matmul of torch's"
        return None


def _lower(gm: GraphModule, ctx: PassContext, node: Node) -> None:
    x, weight, bias = operands(node)
    assert weight is not None
    name = str(weight.read.target)
    with gm.graph.inserting_before(node):
        read = _transposed(gm, ctx, name) if weight.transposed else weight.read
        new = G.call(gm, overload("plain_linear"), (x, read, bias))
    G.substitute(gm, node, new)


def _transposed(gm: GraphModule, ctx: PassContext, name: str) -> Node:
    path, dot, last = name.rpartition(".")
    turned = f"{path}{dot}transposed_{last}"
    if turned not in ctx.weights:
        ctx.weights.add(turned, transpose(ctx.weights[name], (1, 0)))
    return G.constant(gm, ctx.weights, turned)
