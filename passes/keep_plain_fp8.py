"""Hold the weights of a checkpoint of fp8 as it has them. For GPUs.

Before:   llmc.plain_linear(x, dequantised w, bias)
After:    llmc.plain_quantized_linear(x, w's fp8, w's scales, bias, group)
Applies:  all rows of the weight are fp8 of the checkpoint, and linears alone read it; other weights are kept as they are
Why:      decode reads every weight once per step: the checkpoint's 8 bits instead of 16
Order:    after lower-plain-linear, which names the weights. Exact in 16-bit types: the op gives the bits of llmc.plain_linear there
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from llmc.passes import graph as G
from llmc.passes.base import Numerics, Pass, PassContext, PassResult
from llmc.passes.keep_quantized import leaves
from llmc.passes.quantize_plain_linear import FP8, LINEAR, readers_of_constants, rewrite


@dataclass(frozen=True)
class KeepPlainFp8(Pass):
    name: ClassVar[str] = "keep-plain-fp8"
    numerics: ClassVar[Numerics] = Numerics.CLOSE  # in float32 a step of 64 inputs is summed in two halves

    def requires(self, gm: GraphModule) -> str | None:
        return None if any(G.is_op(n, LINEAR) for n in gm.graph.nodes) else "an llmc.plain_linear; lower-plain-linear makes them"

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        refusals: Counter[str] = Counter()
        matches = 0
        readers = readers_of_constants(gm)
        linears = [n for n in gm.graph.nodes if G.is_op(n, LINEAR) and G.is_constant(G.args_of(n)[1])]
        for name in dict.fromkeys(str(G.args_of(n)[1].target) for n in linears):
            stored = leaves(ctx.weights[name].recipe)
            if not stored or any(leaf["form"] != "fp8_rows" for leaf in stored):
                refusals["the checkpoint does not hold it as fp8"] += 1
            elif any(not G.is_op(n, LINEAR) for n in readers[name]):
                refusals["something else than a linear reads the weight"] += 1
            else:
                for node in readers[name]:
                    rewrite(gm, ctx, node, name, FP8)
                    matches += 1
        if matches:
            G.erase_dead(gm)
        return PassResult(changed=matches > 0, matches=matches, refusals=refusals)
