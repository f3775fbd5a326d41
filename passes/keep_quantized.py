"""Hold the weights of a quantised checkpoint as the integers and scales it has.

Before:   llmc.linear(x, packed dequantised w, bias, N); llmc.embedding(ids, packed dequantised w, K) of a tied w
After:    llmc.quantized_linear(x, w's integers, w's scales, bias, N, group); llmc.quantized_embedding(...)
Applies:  all rows of the weight are integers of the checkpoint; other weights are kept as they are
Why:      decode reads every weight once per step: the checkpoint's bits instead of 16
Order:    after lower-linear, whose packed weights it replaces. Close: kernels scale sums of integers in fp32, where llmc.linear reads
          each weight rounded to the model's dtype
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import ClassVar

from torch.fx import GraphModule

from llmc.passes import graph as G
from llmc.passes.base import Numerics, Pass, PassContext, PassResult
from llmc.passes.quantize_linear import EXPERTS, LINEAR, rewrite_all
from llmc.passes.weights import Recipe

_LONGEST_GROUP = 128  # a scale for whole rows is repeated: the kernels know one group size for all


@dataclass(frozen=True)
class KeepQuantized(Pass):
    name: ClassVar[str] = "keep-quantized"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def requires(self, gm: GraphModule) -> str | None:
        return None if any(G.is_op(n, LINEAR, EXPERTS) for n in gm.graph.nodes) else "an llmc.linear; lower-linear makes them"

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        def stored_as(weight: str) -> tuple[int, int] | str:
            stored = leaves(ctx.weights[weight].recipe["input"])
            if not stored:
                return "the checkpoint holds it unquantised"
            if any(leaf["form"] == "fp8_rows" for leaf in stored):
                return "the checkpoint holds it as fp8, which no kernel of a CPU reads"
            bits = 4 if all(leaf["bits"] == 4 and leaf["symmetric"] for leaf in stored) else 8
            return bits, gcd(*(leaf["group"] if leaf["group"] < leaf["shape"][1] else _LONGEST_GROUP for leaf in stored))

        return rewrite_all(gm, ctx, stored_as)


def leaves(recipe: Recipe) -> list[Recipe]:
    """The quantised matrices that a matrix's rows are made of; none if anything else has a part in it."""
    found = list(_walk(recipe))
    return [] if None in found else [leaf for leaf in found if leaf is not None]


def _walk(recipe: Recipe) -> Iterator[Recipe | None]:
    if recipe["op"] == "dequantize":
        yield recipe
    elif recipe["op"] == "concat" and recipe["axis"] == 0:
        for part in recipe["inputs"]:
            yield from _walk(part)
    else:
        yield None
