"""Compute an attention's query, key and value by one linear.

Before:   q = linear(x, wq), k = linear(x, wk), v = linear(x, wv), each on its way to one paged_attention
After:    q, k, v = split(linear(x, concat(wq, wk, wv)), [..])
Applies:  each of q, k, v comes from one linear of the same x; all have a bias or none has; equal dtypes
Why:      x is read once, and one large matmul replaces one medium and two small ones per layer
Order:    after no-op-elimination; before lower-linear. Exact because a column of llmc.linear does not depend on its neighbours
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from llmc.passes import graph as G
from llmc.passes.base import Numerics, Pass, PassContext, PassResult, Reject
from llmc.passes.merging import cannot_merge, linears_behind, merge

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeQKV(Pass):
    name: ClassVar[str] = "merge-qkv"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        matches = 0
        refusals: Counter[str] = Counter()
        for attention in [n for n in gm.graph.nodes if G.is_op(n, G.ATTENTION)]:
            sources = [linears_behind(value) for value in G.args_of(attention)[:3]]
            reject = self.applies(sources)
            if reject is not None:
                refusals[reject.reason] += 1
                continue
            merge(gm, ctx, [source[0] for source in sources], "qkv_merged")
            matches += 1
        if matches:
            G.erase_dead(gm)
        return PassResult(changed=matches > 0, matches=matches, refusals=refusals)

    def applies(self, sources: list[list[Node]]) -> Reject | None:
        """Whether the linears behind q, k and v can be one."""
        if any(len(found) != 1 for found in sources):
            return Reject("q, k or v does not come from one aten.linear", [[n.name for n in found] for found in sources])
        return cannot_merge([found[0] for found in sources])
