"""Hand the matmuls of a mixture of experts to llmc.plain_grouped_linear, the weights as the checkpoint holds them. For GPUs.

Before:   bmm(w[expert_ids], x as columns) with w [E, N, K], or bmm(x as rows, w[expert_ids]) with w [E, K, N]
After:    llmc.plain_grouped_linear(x, w [E, N, K], expert_ids, None)
Applies:  w is a constant of x's dtype, read by such matmuls only; the gathered weights are read by nobody else
Why:      the gather copies an expert's whole matrix per token and choice; the kernel reads each expert in place
Order:    beside lower-plain-linear, in the part that lower-experts has on a CPU
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from llmc.kernels.ops import overload
from llmc.passes import graph as G
from llmc.passes.base import PassContext
from llmc.passes.lower_experts import ExpertProduct, LowerExperts
from llmc.passes.weights import transpose


@dataclass(frozen=True)
class LowerPlainExperts(LowerExperts):
    name: ClassVar[str] = "lower-plain-experts"

    def lower(self, gm: GraphModule, ctx: PassContext, product: ExpertProduct) -> None:
        name = str(product.weights.target)
        if product.transposed:
            path, dot, last = name.rpartition(".")
            turned = f"{path}{dot}transposed_{last}"
            name = turned if turned in ctx.weights else ctx.weights.add(turned, transpose(ctx.weights[name], (0, 2, 1)))
        with gm.graph.inserting_before(product.result):
            read = G.constant(gm, ctx.weights, name)
            new = G.call(gm, overload("plain_grouped_linear"), (product.x, read, product.ids, None))
        G.substitute(gm, product.result, new)
