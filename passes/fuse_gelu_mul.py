"""Fold gelu(gate) * up into one op.

Before:   mul(gelu(gate), up), in either order, gelu exact or by the tanh formula
After:    llmc.gelu_mul(gate, up, tanh)
Applies:  equal shapes and dtypes; nobody else reads gelu's result
Why:      one read and one write of [tokens, intermediate] fewer per layer; rounded once where two ops round twice
Order:    after merge-gate-up, so that gate and up lie in one tensor
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from llmc.kernels.ops import overload
from llmc.passes import graph as G
from llmc.passes.base import NodePass, Numerics, PassContext, Reject
from llmc.passes.fuse_gated import Gated, gated

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseGeluMul(NodePass[Gated]):
    name: ClassVar[str] = "fuse-gelu-mul"
    numerics: ClassVar[Numerics] = Numerics.CLOSE  # rounds once where the two ops round twice

    def find(self, node: Node, ctx: PassContext) -> Gated | Reject | None:
        return gated(node, aten.gelu.default)

    def rewrite(self, gm: GraphModule, ctx: PassContext, match: Gated) -> None:
        tanh = G.argument(match.activation, 1, "approximate", "none") == "tanh"
        with gm.graph.inserting_before(match.product):
            new = G.call(gm, overload("gelu_mul"), (match.gate, match.up, tanh))
        G.substitute(gm, match.product, new)
