"""Fold silu(gate) * up into one op.

Before:   mul(silu(gate), up), in either order
After:    llmc.silu_mul(gate, up)
Applies:  equal shapes and dtypes; nobody else reads silu's result
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
class FuseSiluMul(NodePass[Gated]):
    name: ClassVar[str] = "fuse-silu-mul"
    numerics: ClassVar[Numerics] = Numerics.CLOSE  # rounds once where the two ops round twice

    def find(self, node: Node, ctx: PassContext) -> Gated | Reject | None:
        return gated(node, aten.silu.default)

    def rewrite(self, gm: GraphModule, ctx: PassContext, match: Gated) -> None:
        with gm.graph.inserting_before(match.product):
            new = G.call(gm, overload("silu_mul"), (match.gate, match.up))
        G.substitute(gm, match.product, new)
